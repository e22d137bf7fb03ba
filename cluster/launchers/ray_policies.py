"""Ray Train's trainer, with those of its inner parts changed that it offers no public way to change.

    ray ──▶ [ray_policies] ──▶ Ray Train's controller ──▶ worker groups

Nothing of Ray's inside is imported anywhere else; what is expected of it stands in tests/cluster/launchers/
test_ray_contract.py. Ray's own elastic policy takes any number of workers between min and max. This one rounds what the
cluster can hold down to the next size that splits a batch into whole identities. Ray's failure policy starts the
workers again after every kind of error and counts them all; ours knows which of them a restart does not help, and
which are a node's doing.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import ray
import ray.train
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from clipreid.errors import ModelError
from cluster.errors import ConfigError, Drained, TrainingError
from cluster.launchers.placement import Resources, room_for
from shards.errors import DataError

__all__ = ["CheckpointConfig", "FailureConfig", "LoggingConfig", "RunConfig", "ScalingConfig", "Trainer"]
"""The settings of Ray Train as well: `ray.train` has these classes too, typed as its first version."""

log = logging.getLogger(__name__)
FINAL = (ConfigError, DataError, ModelError, TrainingError)
"""Errors of a worker that a restart would meet again."""
WITHOUT_WORKERS = ("InitializingState", "SchedulingState", "ReschedulingState", "RestartingState")
"""States of Ray's controller."""
ANSWER_S = 10.0
"""Ray's controller answers at once, unless it waits for nodes to place workers on."""


def warn_of_absent_parts() -> None:
    """Log what the installed Ray lacks that a newer one has."""
    if not hasattr(ray.train, "get_preemption_info"):
        log.warning(
            "ray %s does not tell when a node is to be drained (2.58 does): its end costs the steps since the last "
            "checkpoint, and counts towards cluster.max_failures",
            ray.__version__,
        )


def worker_errors(error: BaseException) -> list[BaseException]:
    """What the workers raised, out of Ray's wrapping."""
    failures = getattr(error, "worker_failures", {}).values()
    return [getattr(failure, "_base_exc", failure) for failure in failures]


def final_error(error: BaseException) -> BaseException | None:
    """The first of the workers' errors that a restart would meet again."""
    return next((each for each in worker_errors(error) if isinstance(each, FINAL)), None)


class RestartPolicy(DefaultFailurePolicy):
    """Which errors end the run, and which of the others count towards max_failures."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if final_error(training_failed_error):
            return FailureDecision.RAISE
        if any(isinstance(error, Drained) for error in worker_errors(training_failed_error)):
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


class PreemptionNotice(PreemptionCallback):
    """Tells the workers that their node is about to be taken away. Ray's own, which QUIET_ENVIRONMENT switches off, has
    its watcher started again elsewhere when that one's node dies, and prints an error about that in every run; the
    workers are started anew then, with a watcher of their own."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop_watcher()
        nodes: dict[str, list[int]] = {}
        actors = {}
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            nodes.setdefault(worker.metadata.node_id, []).append(rank)
            actors[rank] = worker.actor
        watcher: Any = ray.remote(num_cpus=0)(PreemptionWatcher)
        self._watcher = watcher.remote(
            node_to_ranks=nodes, poll_interval_s=self._poll_interval_s, worker_actors_by_rank=actors
        )


class WholeIdentitiesPolicy(ElasticScalingPolicy):
    """`sizes`: the numbers of workers that may be, ascending."""

    def __init__(self, scaling_config: ScalingConfig, sizes: list[int]):
        super().__init__(scaling_config)
        self.sizes = sizes

    def _get_num_workers_for_resource_request(self) -> int:
        return self.sizes[-1]

    def _count_possible_workers(self, reserved: Mapping[str, Resources] | Sequence[Resources]) -> int:
        """The largest size that fits; 0, which Ray takes as a reason to wait, where none does. reserved: what each node
        has for the run; before Ray 2.60 without the nodes' names. Ray's own count leaves out the strict placements."""
        nodes = list(reserved.values() if isinstance(reserved, Mapping) else reserved)
        need = self.scaling_config._resources_per_worker_not_none
        possible = room_for(nodes, need, str(self.scaling_config.placement_strategy))
        return max((size for size in self.sizes if size <= possible), default=0)


class Trainer(TorchTrainer):
    """A TorchTrainer whose worker group takes one of `sizes`; a single size is fixed."""

    def __init__(self, *args: Any, sizes: list[int], **options: Any):
        super().__init__(*args, **options)
        self.sizes = sizes
        self.ended = False
        """Whether `end_unless_running` has ended the run."""
        self._controller: Any = None

    def end_unless_running(self) -> None:
        """End the run where there are no workers that could save a checkpoint first."""
        if self._controller is None:
            return
        try:
            state = type(ray.get(self._controller.get_state.remote(), timeout=ANSWER_S)).__name__
        except ray.exceptions.GetTimeoutError:
            state = "SchedulingState"
        if state in WITHOUT_WORKERS:
            self.ended = True
            ray.kill(self._controller)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Not Ray's handler, which ends the workers before they save: see `StopSignals`."""
        self._controller = controller

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        # Ray annotates both with the classes of its first version.
        failures = cast(FailureConfig, self.run_config.failure_config)
        scaling = cast(ScalingConfig, self.scaling_config)
        parts["failure_policy"] = RestartPolicy(failures)
        if scaling.elasticity_enabled:
            parts["scaling_policy"] = WholeIdentitiesPolicy(scaling, self.sizes)
        return super()._initialize_and_run_controller(**parts)

    def _create_default_callbacks(self) -> list[Any]:
        """Without Ray's cleaner of placement groups, an actor that asks whatever cluster it finds on the machine for
        the run's controller. With several there it fails, or finds no such controller and takes the workers away.

        The placement group goes with its driver anyway.
        """
        callbacks = super()._create_default_callbacks()
        kept = [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
        return [*kept, PreemptionNotice()]
