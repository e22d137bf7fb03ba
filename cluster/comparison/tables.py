"""A comparison as text: what the terminal and the page show in their cells, and the terminal's tables.

comparison ──▶ [tables] ──▶ terminal, page
"""

from collections.abc import Iterator, Sequence

from rich.table import Column, Table

from clipreid.statistics.bootstrap import Difference, Estimate
from cluster.comparison.comparison import Change, Comparison
from cluster.comparison.query_results import QueryResults


def sentence(comparison: Comparison) -> str:
    """What the intervals are."""
    return (
        f"{comparison.queries:,} queries of {comparison.identities:,} identities; in brackets 95 % intervals, from "
        f"{comparison.resamples:,} resamples of the identities (seed {comparison.seed}), the same for all runs"
    )


def tables(comparison: Comparison) -> Iterator[Table]:
    """Settings that differ, figures, differences."""
    yield settings_table(comparison)
    figures = Table("run", *comparison.figures[0], title="figures, %", title_justify="left")
    for name, row in zip(comparison.names, comparison.figures, strict=True):
        figures.add_row(name, *map(figure_cell, row.values()))
    yield figures
    first = comparison.names[0]
    title = f"less those of {first}; then in how many resamples the difference has that sign"
    differences = Table("run", *comparison.figures[0], title=title, title_justify="left")
    for name, changed in zip(comparison.names[1:], comparison.differences, strict=True):
        differences.add_row(name, *map(difference_cell, changed.values()))
    yield differences


def settings_table(comparison: Comparison) -> Table:
    if not comparison.settings:
        return Table("settings: none differs")
    table = Table("setting that differs", *comparison.names)
    for key, values in comparison.settings.items():
        table.add_row(key, *map(str, values))
    return table


def changes_table(name: str, first: str, results: QueryResults, changes: Sequence[Change]) -> Table:
    """The queries that a run ranks otherwise than the first."""
    title = f"queries that changed most from {first} to {name}"
    query = Column("query", overflow="fold")
    table = Table(query, "identity", "AP, %", "rank of the first match", title=title, title_justify="left")
    for change in changes:
        row = int(results.rows[change.number])
        before, after = (f"{100 * AP:.1f}" for AP in change.AP)
        ranks = f"{change.first_rank[0]} → {change.first_rank[1]}"
        table.add_row(results.query.key(row), results.query.identity_of(row), f"{before} → {after}", ranks)
    return table


def figure_cell(estimate: Estimate) -> str:
    """ "65.5" and below it "[61.2, 69.8]", in percent."""
    return f"{100 * estimate.value:.1f}\n[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def difference_cell(difference: Difference) -> str:
    """ "+1.2", "[-0.3, +2.7]" and, of a difference that is one, "94.1 %" of the resamples; in percentage points."""
    value, low, high = (100 * each for each in (difference.value, difference.low, difference.high))
    share = f"\n{100 * difference.same_sign:.1f} %" if value else ""
    return f"{value:+.1f}\n[{low:+.1f}, {high:+.1f}]{share}"
