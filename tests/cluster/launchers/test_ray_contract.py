"""What the code expects of Ray's inside, name by name: a new version of Ray that breaks it is told here, not in a run.

All of it is imported in cluster/launchers/ray_policies.py; the newest Ray that the lock names and the oldest that
pyproject.toml allows are held to the same (`make test`, `make test-floor`).
"""

import inspect
import textwrap

import pytest
import ray.train
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller import state as controller_states
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from cluster.launchers import ray_policies
from cluster.ranks.process import QUIET_ENVIRONMENT
from cluster.run.interrupts import Interrupts
from cluster.run.storage import Storage
from tests.test_layers import MODULES, imported

CHANGED = [
    (DefaultFailurePolicy, "make_decision", ["training_failed_error"]),
    (ElasticScalingPolicy, "_get_num_workers_for_resource_request", []),
    (ElasticScalingPolicy, "_count_possible_workers", 1),
    (PreemptionCallback, "after_worker_group_start", ["worker_group"]),
    (TorchTrainer, "_register_sigint_handler", ["controller"]),
    (TorchTrainer, "_create_default_callbacks", []),
    (TorchTrainer, "_initialize_and_run_controller", 1),
]
"""Methods that ours take the place of, and what they are called with: by name, or so many by position."""


@pytest.mark.parametrize("owner, method, parameters", CHANGED)
def test_a_method_that_is_replaced_is_there_and_takes_what_ours_takes(owner, method, parameters):
    found = list(inspect.signature(getattr(owner, method)).parameters)[1:]
    assert found == parameters if isinstance(parameters, list) else len(found) == parameters


@pytest.mark.parametrize(
    "owner, method, calls",
    [
        (TorchTrainer, "fit", ["self._initialize_and_run_controller(", "failure_policy=", "scaling_policy="]),
        (TorchTrainer, "fit", ["callbacks=self._create_default_callbacks()"]),
        (TorchTrainer, "_initialize_and_run_controller", ["self._register_sigint_handler(controller)"]),
        (TrainController, "__init__", ["failure_policy", "scaling_policy"]),
    ],
)
def test_what_is_replaced_is_still_what_ray_calls(owner, method, calls):
    source = "".join(textwrap.dedent(inspect.getsource(getattr(owner, method))).split())
    assert [call for call in calls if call not in source] == []


def test_decisions_errors_and_settings_have_the_parts_that_are_used():
    assert {"RETRY", "RAISE"} <= set(FailureDecision.__members__)
    wrapped = UserExceptionWithTraceback(KeyError("x"), "trace")
    assert isinstance(wrapped._base_exc, KeyError)
    assert WorkerGroupError("failed", {1: wrapped}).worker_failures == {1: wrapped}
    scaling = ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1.0}, placement_strategy="SPREAD")
    assert scaling.elasticity_enabled and scaling._resources_per_worker_not_none == {"CPU": 1.0}
    assert not ScalingConfig(num_workers=2).elasticity_enabled
    assert FailureConfig(max_failures=-1).max_failures == -1
    assert "logging_config" in inspect.signature(RunConfig).parameters


def test_the_watcher_of_drained_nodes_takes_what_it_is_given():
    """Since 2.57."""
    callback = PreemptionCallback()
    assert callable(callback._stop_watcher) and callback._poll_interval_s > 0 and hasattr(callback, "_watcher")
    watched = set(inspect.signature(PreemptionWatcher).parameters)
    assert {"node_to_ranks", "poll_interval_s", "worker_actors_by_rank"} <= watched


def test_a_controller_tells_its_state_by_the_names_that_a_stop_looks_for():
    assert callable(TrainController.get_state)
    assert [name for name in ray_policies.WITHOUT_WORKERS if not hasattr(controller_states, name)] == []


def test_ray_knows_the_environment_variables_that_are_set():
    known = {value for name, value in vars(constants).items() if name.endswith("_ENV_VAR")}
    ours = {name for name in QUIET_ENVIRONMENT if name.startswith("RAY_TRAIN_")}
    assert ours | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"} <= known


def test_rays_inside_is_imported_in_one_module():
    inside = {
        path.name
        for path in MODULES.values()
        for name, _ in imported(path)
        if name.startswith("ray.") and (name.startswith("ray.train.v2") or "._" in name)
    }
    assert inside == {"ray_policies.py"}


def test_a_ray_without_drain_notices_says_so_and_the_run_goes_on_without(monkeypatch, caplog, tmp_path):
    """2.57 has none."""
    monkeypatch.delattr(ray.train, "get_preemption_info", raising=False)
    ray_policies.warn_of_absent_parts()
    assert f"ray {ray.__version__} does not tell when a node is to be drained (2.58 does)" in caplog.text
    interrupts = Interrupts(Storage(tmp_path), under_ray=True)
    pending = interrupts.pending()
    assert pending.drain_poll and interrupts.confirm(pending) is None
