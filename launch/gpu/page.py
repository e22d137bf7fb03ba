"""The results of `bench.py gpu` as a page of Markdown, whose tables are for the README.

parts' reports ──▶ [page] ──▶ gpu.md
"""

from collections.abc import Iterator, Mapping
from typing import Any

Report = Mapping[str, Any]


def page(result: Report) -> str:
    """Of the whole result, or of as much as there is."""
    reports = {report["name"]: report for report in result["parts"]}
    lines = [
        f"# {result['device']}, {result['date']}",
        "",
        f"torch {result['torch']}, Python {result['python']}, commit {result['commit']}; {result['seconds']} s",
    ]
    if result["rehearsal"]:
        lines += ["", "**A rehearsal on a CPU in small sizes: its figures say nothing of a GPU.**"]
    lines += ["", *_outcomes(result["parts"])]
    results = {name: report["result"] for name, report in reports.items() if report["result"]}
    lines += ["", *_aims(results), *_compiling(results)]
    for name, section in SECTIONS.items():
        if name in results:
            lines += ["", *section(results[name])]
    return "\n".join([*lines, ""])


def _outcomes(reports: list[Report]) -> Iterator[str]:
    yield from _table(["part", "outcome", "s"], ([r["name"], r["outcome"], r["seconds"]] for r in reports))


def _rows(results: Report, part: str) -> list[Report]:
    """Of `bench.py stage2`, without those of loops that did not run."""
    return [row for row in results.get(part, {}).get("rows", []) if "error" not in row]


def _aims(results: Report) -> Iterator[str]:
    """The best loop at each of the two batch sizes, and what the loader leaves of it."""
    rows = [row for part in ("stage2", "compiled", "engine") for row in _rows(results, part) if row["mode"] != "plain"]
    for batch, key, aim in ((64, "times_plain", "3 times the plain loop"), (256, "share_of_peak", "0.5 of the peak")):
        if of_batch := [row for row in rows if row["batch"] == batch and key in row]:
            best = max(of_batch, key=lambda row: row[key])
            yield f"- batch {batch}, aim {aim}: {best[key]} ({best['model']}, {best['mode']})"
    for row in results.get("feed", {}).get("rows", []):
        ratio = row["fed_over_ready"]
        yield f"- {row['what']} fed by the loader, batch {row['batch']}, aim 0.95 of images at hand: {ratio}"


def _compiling(results: Report) -> Iterator[str]:
    """After how many steps a compiled encoder has earned its compilation: what `COMPILE_PAYS_FROM` is decided by."""
    eager = {_case(row): row for row in _rows(results, "stage2") if row["mode"] == "eager"}
    for row in _rows(results, "compiled"):
        if row["mode"] == "compiled" and (beside := eager.get(_case(row))):
            saved_s = row["batch"] * (1 / beside["images_per_s"] - 1 / row["images_per_s"])
            after = f"pays after {row['first_steps_s'] / saved_s:,.0f} steps" if saved_s > 0 else "never pays"
            yield f"- compiling {row['model']}, batch {row['batch']}: {after}"


def _case(row: Report) -> tuple[Any, ...]:
    return row["model"], *row["image_size"], row["batch"]


def _checks(result: Report) -> Iterator[str]:
    yield f"Checks: {result['passed']} passed, {len(result['failed'])} failed, {len(result['skipped'])} skipped"
    yield from (f"- failed: {name}" for name in result["failed"])
    yield from (f"- skipped: {name}: {why}" for name, why in result["skipped"].items())


def _steps(result: Report) -> Iterator[str]:
    """`bench.py stage2`, in whichever modes."""
    yield f"Stage 2, {result['precision']}; the measured peak is {result['matmul_peak_tflops']} TFLOP/s"
    yield ""
    heads = ["model", "pixels", "batch", "loop", "images/s", "of the peak", "over plain", "GB", "first steps, s"]
    yield from _table(heads, (_step(row) for row in result["rows"]))
    for row in result["rows"]:
        if "kernels" in row:
            yield from _kernels(row)


def _step(row: Report) -> list[Any]:
    height, width = row["image_size"]
    case = [row["model"], f"{height}×{width}", row["batch"], row["mode"]]
    if "error" in row:
        return [*case, row["error"], "", "", "", ""]
    share, memory = f"{row['share_of_peak']:.0%}", f"{row['peak_memory_bytes'] / 1e9:.1f}"
    return [*case, row["images_per_s"], share, row.get("times_plain", ""), memory, row["first_steps_s"]]


def _kernels(row: Report) -> Iterator[str]:
    seen = row["kernels"]
    yield ""
    yield f"Kernels of a step ({row['mode']}, {seen['busy_ms']} ms of kernels in a step of {seen['step_ms']} ms)"
    yield ""
    rows = ([_cell(k["name"]), k["ms"], f"{k['share']:.1%}", k["calls"]] for k in seen["rows"])
    yield from _table(["kernel", "ms", "share", "calls"], rows)


def _feed(result: Report) -> Iterator[str]:
    yield f"Fed from JPEGs of {result['jpeg']}, over images at hand ({result['arch']}; loaders: {result['loaders']})"
    yield ""
    keys = ("what", "batch", "ready_images_per_s", "fed_images_per_s", "fed_over_ready", "loader_images_per_s")
    heads = ["", "batch", "at hand, images/s", "fed, images/s", "ratio", "loader alone"]
    yield from _table(heads, ([row.get(key, "") for key in keys] for row in result["rows"]))


def _evaluate(result: Report) -> Iterator[str]:
    size = f"{result['queries']:,} × {result['gallery']:,} × {result['width']:,}"
    yield f"Evaluation, {size}: {result['seconds']} s, {result['times_product']} times the bare product"
    yield f"Equal to the plain version in a sample of {result['sample']}: {result['sample_equals_plain']}"


def _rerank(result: Report) -> Iterator[str]:
    size = f"{result['queries']:,} + {result['gallery']:,}"
    seconds = result["rerank"]["seconds"]
    yield f"Re-ranking, {size}: {seconds} s, {result['times_product']} times the bare product"


def _stage1(result: Report) -> Iterator[str]:
    yield f"Stage 1, {result['arch']}, batch {result['batch']}, {result['precision']}"
    yield ""
    keys = ("identities", "images_per_identity", "samples_per_s", "plain_samples_per_s", "ratio")
    heads = ["identities", "images of each", "images/s", "plain", "ratio"]
    yield from _table(heads, ([case[key] for key in keys] for case in result["cases"]))


SECTIONS = {
    "checks": _checks,
    "stage2": _steps,
    "compiled": _steps,
    "engine": _steps,
    "feed": _feed,
    "stage1": _stage1,
    "evaluate": _evaluate,
    "rerank": _rerank,
    "kernels": _steps,
}


def _table(heads: list[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)


def _cell(text: str, most: int = 90) -> str:
    return text.replace("|", "\\|") if len(text) <= most else text.replace("|", "\\|")[:most] + "…"
