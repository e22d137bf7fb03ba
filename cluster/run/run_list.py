"""The runs of a folder, a line each: what they are doing, when they last gave a sign of life, how good they are.

RUNS/*/status.json, metrics.json ──▶ [run list] ──▶ `launch/status.py RUNS`
"""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cluster.run.reporter import headline
from cluster.run.run_folder import BEST, CONFIG, STATUS, has_ended, read_metrics, read_status
from cluster.run.status_view import UNMEASURED, MeanAP, activity_of, clock, is_lifeless
from cluster.run.storage import Storage

UNREADABLE = "status.json is missing or damaged"


@dataclass(frozen=True)
class RunLine:
    """One run."""

    name: str
    state: str
    age_s: float | None
    """Since its last sign of life; None where it has given none."""
    mAP: MeanAP
    is_over: bool
    """Nothing more is to come of it: it has ended, or nobody knows."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "state": self.state,
            "age_s": self.age_s,
            "best_mAP": self.mAP.best,
            "best_epoch": self.mAP.best_epoch,
            "final_mAP": self.mAP.final,
        }


def list_runs(folder: Storage, now_s: float) -> list[RunLine]:
    """The runs directly below a folder, by name; other folders are passed over."""
    runs = {name: Storage(folder.place(name)) for name in folder.names("") if not name.startswith(".")}
    return [_line(name, run, now_s) for name, run in runs.items() if run.exists(STATUS) or run.exists(CONFIG)]


def _line(name: str, run: Storage, now_s: float) -> RunLine:
    status = read_status(run)
    if not status:
        return RunLine(name, UNREADABLE, None, mean_ap(run, status), True)
    doing = activity_of(status).text
    state = f"no sign of life; was in: {doing}" if is_lifeless(status, now_s) else doing
    is_over = has_ended(status) or is_lifeless(status, now_s)
    return RunLine(name, state, max(now_s - status["updated"], 0.0), mean_ap(run, status), is_over)


def mean_ap(run: Storage, status: dict[str, Any]) -> MeanAP:
    """What a run has reached, of VehicleID in its largest gallery. status: the run's, or nothing."""
    metrics = read_metrics(run)
    final = headline(metrics)["mAP"] if metrics.keys() - {"untrained"} else None
    best = status.get(BEST)
    if best and (final is None or best["mAP"] > final):
        return MeanAP(best["mAP"], best["epoch"], final)
    return UNMEASURED if final is None else MeanAP(final, None, final)


def runs_table(lines: list[RunLine]) -> Table:
    table = Table("run", "state", "last sign of life", "best mAP, %", "final mAP, %")
    for line in lines:
        age = "-" if line.age_s is None else f"{clock(line.age_s)} ago"
        table.add_row(line.name, line.state, age, line.mAP.best_text, line.mAP.final_text)
    return table
