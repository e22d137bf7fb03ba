"""A stage of a million identities on some ranks: steps, a checkpoint, and on from it on other ranks, with its memory.

Steps on R ranks ──▶ checkpoint ──▶ [resume] ──▶ Steps on R' ranks: the same loss?
"""

from typing import Any

from cluster.ranks.team import Team
from cluster.run.manifest import Position
from cluster.run.storage import Storage
from cluster.training.checkpoint import Retention, find_newest
from cluster.training.checkpoint_writer import CheckpointWriter, Origin
from launch.scaling.ranks import TIMEOUT_S, on_ranks
from launch.scaling.stages import Case, Steps, peak_memory_bytes

ROOM_BYTES = 1.5e9
"""For libraries, the replicated model and what a step needs, beside a rank's share of the tables."""


def checkpoint_and_resume(case: Case, num_steps: int, folder: str, ranks: tuple[int, int]) -> dict[str, Any]:
    """On ranks[0], then on ranks[1]: peak memory of the ranks beside what is allowed, and the loss of the step that
    follows the checkpoint, in both."""
    written = on_ranks(ranks[0], _train_and_save, case, num_steps, folder)
    read = on_ranks(ranks[1], _resume, case, num_steps, folder)
    table_bytes = written[0]["table_bytes"]
    result: dict[str, Any] = {"stage": case.stage, "identities": case.identities, "table_bytes": table_bytes}
    for name, count, results in (("trained", ranks[0], written), ("resumed", ranks[1], read)):
        allowed = table_bytes / count + ROOM_BYTES
        peak = max(one["peak_memory_bytes"] for one in results)
        result[name] = {
            "ranks": count,
            "steps": num_steps,
            "peak_memory_mb": round(peak / 1e6),
            "allowed_mb": round(allowed / 1e6),
            "within": peak <= allowed,
            "loss_after_checkpoint": results[0]["loss"],
        }
    return result


def _train_and_save(team: Team, case: Case, num_steps: int, folder: str) -> dict[str, Any]:
    steps = Steps(case, team)
    for _ in range(num_steps):
        steps.step(steps.next_batch())
    writer = CheckpointWriter(Storage(folder), team, Origin({}, "bench"), Retention(keep=1), timeout_s=TIMEOUT_S)
    writer.save(Position(case.stage, 1, num_steps, num_steps, False), steps.engine)
    writer.finish()
    loss = steps.step(steps.next_batch())["loss"]
    peak = peak_memory_bytes(team.device)
    return {"table_bytes": steps.table_bytes(), "peak_memory_bytes": peak, "loss": loss}


def _resume(team: Team, case: Case, num_steps: int, folder: str) -> dict[str, Any]:
    steps = Steps(case, team)
    checkpoint = find_newest(Storage(folder), team).checkpoint
    assert checkpoint is not None
    checkpoint.load(steps.engine, team)
    steps.taken = num_steps
    loss = steps.step(steps.next_batch())["loss"]
    for _ in range(num_steps - 1):
        steps.step(steps.next_batch())
    return {"peak_memory_bytes": peak_memory_bytes(team.device), "loss": loss}
