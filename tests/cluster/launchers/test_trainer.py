"""What is changed in Ray Train's trainer: sizes of the worker group, which errors a restart follows, where its records
lie, and one actor less. No cluster is started."""

import pickle

import pytest
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.errors import Drained, RankLost, TrainingError
from cluster.launchers.ray import _root_cause, _variables, ray_storage
from cluster.launchers.ray_policies import RestartPolicy, Trainer, WholeIdentitiesPolicy, final_error
from cluster.run.storage import Storage
from cluster.settings.yaml_file import parse_config

NODES = {"one": {"CPU": 2.0}, "two": {"CPU": 5.0}}


@pytest.mark.parametrize("placement, possible", [("PACK", 4), ("SPREAD", 4), ("STRICT_SPREAD", 2), ("STRICT_PACK", 4)])
def test_an_elastic_group_has_the_largest_size_that_divides_the_batch_and_fits_its_placement(placement, possible):
    scaling = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1}, placement_strategy=placement)
    policy = WholeIdentitiesPolicy(scaling, sizes=[1, 2, 4, 8])
    assert policy._count_possible_workers(NODES) == possible
    assert policy._count_possible_workers({"one": NODES["one"]}) == (1 if placement == "STRICT_SPREAD" else 2)
    assert policy._count_possible_workers({}) == 0
    assert policy._count_possible_workers(list(NODES.values())) == possible  # as Ray has it before 2.60


def test_rays_cleaner_which_may_ask_another_cluster_on_the_machine_is_left_out():
    trainer = Trainer(print, sizes=[1], scaling_config=ScalingConfig(num_workers=1))
    ours = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    theirs = {type(callback).__name__ for callback in super(Trainer, trainer)._create_default_callbacks()}
    assert theirs - ours == {"PlacementGroupCleanerCallback"}


LOST = RankLost(0, "average losses", 3.0, {1: "silent"}, "connection reset")


def failed(**errors):
    """Ray's error of a worker group, as its controller sees it."""
    wrapped = {int(rank[-1]): UserExceptionWithTraceback(error, str(error)) for rank, error in errors.items()}
    return pickle.loads(pickle.dumps(WorkerGroupError("workers failed", wrapped)))


def test_drains_do_not_count_towards_max_failures():
    policy = RestartPolicy(FailureConfig(max_failures=1))
    drains = [failed(rank0=Drained("stopped"), rank1=LOST) for _ in range(4)]
    assert {policy.make_decision(error) for error in drains} == {FailureDecision.RETRY}
    decisions = [policy.make_decision(failed(rank1=LOST)) for _ in range(2)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RAISE]


def test_what_a_restart_would_meet_again_ends_the_run_with_its_own_error():
    error = failed(rank0=LOST, rank1=TrainingError("disk full"))
    assert RestartPolicy(FailureConfig(max_failures=-1)).make_decision(error) == FailureDecision.RAISE
    cause = final_error(error)
    assert isinstance(cause, TrainingError) and str(cause) == "disk full"


def test_a_run_given_up_says_after_how_many_restarts_and_what_to_do():
    message = _root_cause(failed(rank1=LOST), max_failures=3)
    assert "worker 1: rank 0 waited 3 s in 'average losses'" in message and "after 3 restarts" in message
    assert "repeat the command" in message and "cluster.max_failures" in message


def test_what_a_user_has_set_in_the_environment_wins(monkeypatch):
    config = parse_config({"data": {"shards": "x"}, "cluster": {"workers": {"min": 1, "max": 2}}})
    names = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert [_variables(config)[name] for name in names] == ["20", "0.5"]
    for name in names:
        monkeypatch.setenv(name, "7")
    assert [_variables(config)[name] for name in names] == ["7", "7"]


def test_rays_records_go_to_the_run_folder_behind_any_url(tmp_path):
    assert ray_storage(Storage(tmp_path / "run")) == {"storage_path": f"{tmp_path}/run/ray"}
    run = Storage("memory://runs/one")  # Not one of those that Ray's own library knows.
    StorageContext(experiment_dir_name="start", **ray_storage(run))
    assert run.names("ray/start")
