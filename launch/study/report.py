"""The runs as tables: mean and spread over seeds, and each row against the published choice.

    run folders ──▶ [report] ──▶ claims.json, claims.md

Only what has been run is in them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from clipreid.statistics.bootstrap import Difference
from launch.study.comparison import compare, query_ap
from launch.study.plan import RAW, PlannedRun, Row, Table, seeds_of
from launch.study.runner import Study


def measure(
    study: Study, tables: Sequence[Table], most_seeds: int | None, raw: Path, identity_of: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Each table with its rows: mAP and R1 of every seed, and the paired difference to the published row."""
    measured = []
    for table in tables:
        seeds = list(seeds_of(table, most_seeds))
        published = [query_ap(_queries(study, table.published, seed)) for seed in seeds]
        rows = [{"name": RAW, **_figures([raw])}] if table.raw else []
        for row in table.rows:
            files = [_queries(study, row, seed) for seed in seeds]
            facts = {"name": row.title, **_figures(files)}
            if row != table.published:
                facts["less_published"] = asdict(compare([query_ap(f) for f in files], published, identity_of))
            rows.append(facts)
        measured.append({"table": table.number, "title": table.title, "seeds": len(seeds), "rows": rows})
    return measured


def write(measured: list[dict[str, Any]], folder: Path) -> tuple[Path, str]:
    """claims.json and claims.md in the study's folder; the place of the latter, and its text."""
    (folder / "claims.json").write_text(json.dumps(measured, indent=1) + "\n")
    text = as_text(measured)
    (folder / "claims.md").write_text(text)
    return folder / "claims.md", text


def as_text(measured: list[dict[str, Any]]) -> str:
    """One table in Markdown, in percent."""
    lines = [
        "| paper's table | | mAP | R1 | mAP less the published choice's, and its 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for table in measured:
        title = f"{table['table']}: {table['title']} ({_counted(table['seeds'], 'seed')})"
        for row in table["rows"]:
            lines.append(f"| {title} | {row['name']} | {_spread(row['mAP'])} | {_spread(row['R1'])} | {_less(row)} |")
            title = ""
    return "\n".join(lines) + "\n"


def _queries(study: Study, row: Row, seed: int) -> Path:
    return study.queries(PlannedRun(row.variant, seed, ()), row.descriptor)


def _figures(queries: Sequence[Path]) -> dict[str, Any]:
    found = [json.loads(path.with_suffix(".json").read_text()) for path in queries]
    return {name: [metrics[name] for metrics in found] for name in ("mAP", "R1")}


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * np.mean(values):.1f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def _less(row: Mapping[str, Any]) -> str:
    if "less_published" not in row:
        return ""
    less = Difference(**row["less_published"])
    sure = "" if less.low > 0 or less.high < 0 else ", not told apart"
    return f"{100 * less.value:+.1f} ({100 * less.low:+.1f} to {100 * less.high:+.1f}{sure})"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count > 1)}"
