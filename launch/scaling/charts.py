"""Charts and tables of what was measured, as files beside the JSON.

result of a benchmark ──▶ [charts] ──▶ NAME.json, NAME.md, NAME.png
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLOURS = ("#1f77b4", "#d95f02", "#2a9d3a", "#7b4ab5")


def write(folder: Path, name: str, result: Mapping[str, Any], table: str, figure: Figure) -> None:
    """All three into `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    figure.savefig(folder / f"{name}.png", dpi=150)


def table(columns: Mapping[str, Callable[[Any], object]], rows: Sequence[Any]) -> str:
    """In Markdown."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[str(value(row)) for value in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def scale_chart(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Step time, bytes and memory over N, a column of panels a stage, a line for each number of ranks."""
    panels = {
        "step, ms": lambda row: row["step_ms"],
        "bytes sent per rank and step, kB": lambda row: row["sent_bytes"] / 1e3,
        "peak memory per rank, GB": lambda row: row["peak_memory_mb"] / 1e3,
    }
    stages = sorted({row["stage"] for row in rows})
    figure = Figure(figsize=(3.6 * len(panels), 3.0 * len(stages)), layout="constrained")
    grid = figure.subplots(len(stages), len(panels), squeeze=False)
    for stage, line_of_panels in zip(stages, grid, strict=True):
        for (title, value), axes in zip(panels.items(), line_of_panels, strict=True):
            _lines_of_ranks(axes, [row for row in rows if row["stage"] == stage], value)
            axes.set(xlabel="identities N", xscale="log")
            axes.set_title(f"stage {stage}: {title}", fontsize=9)
            if "bytes" in title:
                axes.set_ylim(0, None)
            else:
                axes.set_yscale("log")
                _plain_numbers(axes.yaxis)
            _plain_numbers(axes.xaxis)
    return figure


def _lines_of_ranks(axes: Axes, rows: Sequence[Mapping[str, Any]], value: Callable[[Any], float]) -> None:
    for ranks, colour in zip(sorted({row["ranks"] for row in rows}), COLOURS, strict=False):
        own = [row for row in rows if row["ranks"] == ranks]
        label = f"{ranks} rank{'s' if ranks > 1 else ''}"
        axes.plot([r["identities"] for r in own], [value(r) for r in own], "o-", color=colour, label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _plain_numbers(axis: Axis) -> None:
    """On a logarithmic axis, in place of powers, whose fonts are not everywhere."""
    axis.set_major_formatter("{x:,.12g}")
    axis.set_minor_formatter(NullFormatter())


def cluster_chart(predicted: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Predicted efficiency over GPUs, a panel for each way to scale; a band a stage, from nothing to everything that
    crosses the network hidden behind the computation."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (scaling, rows) in zip(
        figure.subplots(1, len(predicted), squeeze=False)[0], predicted.items(), strict=True
    ):
        for stage, colour in zip(sorted({row["stage"] for row in rows}), COLOURS, strict=False):
            own = [row for row in rows if row["stage"] == stage]
            gpus, low = [row["gpus"] for row in own], [row["efficiency"] for row in own]
            axes.plot(gpus, low, "o-", color=colour, label=f"stage {stage}")
            axes.fill_between(gpus, low, [row["efficiency_overlapped"] for row in own], color=colour, alpha=0.2)
        axes.set_xscale("log", base=2)
        _plain_numbers(axes.xaxis)
        axes.set(title=f"{scaling} scaling", xlabel="GPUs", ylabel="efficiency")
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
