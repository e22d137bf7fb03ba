"""What an evaluation says of each query, as a table (CSV) for spreadsheets and further programs.

    metrics ── per query: rank of the first match, AP, nearest images ──▶ [per-query file]

One line a query, in the order of the queries. Images are named by their keys, or by their row numbers where there are
none. Distances are Euclidean, of the descriptors as they are compared.
"""

import csv
import io
from dataclasses import dataclass

import numpy as np

from clipreid.retrieval.metrics import Retrieval
from shards.storage import write_atomic


@dataclass(frozen=True)
class PerQueryFile:
    path: str
    top_k: int = 0
    """Length of the list of nearest gallery images, after what the rule takes out; 0: none."""

    def write(self, result: Retrieval, query_keys: np.ndarray | None, gallery_keys: np.ndarray | None) -> None:
        """Columns: query, positives, first_rank, AP, INP, and with top_k nearest_1 …, distance_1 …

        keys: strings [Q] and [G]. first_rank, AP and INP are empty for a query without a match.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        ranks = range(1, self.top_k + 1)
        listed = [f"{name}_{rank}" for name in ("nearest", "distance") for rank in ranks]
        table.writerow(["query", "positives", "first_rank", "AP", "INP", *listed])
        found = result.per_query
        for row, positives in enumerate(found.positives):
            cells = [_name(query_keys, row), positives]
            cells += (found.first_rank[row], found.AP[row], found.INP[row]) if positives else ("", "", "")
            if result.nearest:
                cells += [_name(gallery_keys, other) for other in result.nearest.rows[row]]
                distances = result.nearest.distances[row]
                cells += [f"{distance:.6f}" if np.isfinite(distance) else "" for distance in distances]
            table.writerow(cells)
        with write_atomic(self.path) as file:
            file.write(text.getvalue().encode())


def _name(keys: np.ndarray | None, row: int) -> str | int:
    """Empty for no image, row -1."""
    if row < 0:
        return ""
    return row if keys is None else keys[row]
