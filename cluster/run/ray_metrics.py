"""A run's live figures as Ray metrics.

    reporter on rank 0 ──▶ [gauges] ──▶ ray_clipreid_loss{run="…"} … at the node's metrics port

Every node's agent serves them to Prometheus.
"""

from typing import Any

from shards.errors import masked

DESCRIPTIONS = {
    "stage": "stage that is being trained, 1 or 2",
    "epoch": "epoch of the stage, from 1",
    "step": "optimizer steps done in the stage",
    "loss": "loss of the last step, over the global batch",
    "images_per_s": "training throughput over all workers, images per second",
    "steps_left": "optimizer steps left in the stage",
    "restarts": "times this run was started again",
    "workers": "workers of the run",
    "checkpoint_at": "unix time of the last checkpoint, in seconds",
}


class Gauges:
    """One gauge per figure, tagged with the run's folder. Works inside a Ray worker only."""

    def __init__(self, run_dir: str):
        from ray.util.metrics import Gauge

        self._tags = {"run": masked(run_dir)}
        self._gauges = {
            name: Gauge(f"clipreid_{name}", description=text, tag_keys=("run",)) for name, text in DESCRIPTIONS.items()
        }

    def set(self, facts: dict[str, Any]) -> None:
        """Take over those facts of a status that have a gauge."""
        for name, gauge in self._gauges.items():
            if facts.get(name) is not None:
                gauge.set(float(facts[name]), tags=self._tags)
