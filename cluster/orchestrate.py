"""Placing workers: Ray Train on a cluster, the processes that torchrun started, or this process alone.

    launch/train.py ──▶ [orchestrate] ──▶ worker.train on every worker ──▶ metrics.json in the run folder

Ray Train places the workers and starts them again after a failure; what they compute is `worker.train`, which
does not know who placed it.
"""

import contextlib
import json
import logging
import os
import signal
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from clipreid.errors import ModelError
from cluster.config import Config, parse_config
from cluster.errors import ConfigError, RankLost, TrainingError
from cluster.live import read_status
from cluster.manifest import FOLDER, read_manifests
from cluster.report import STOP, request_stop, withdraw_stop
from cluster.run_folder import METRICS
from cluster.storage import Storage
from shards.errors import DataError

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent

FAILURE = "failure.json"
STOPPED_EXIT_CODE = 128 + signal.SIGTERM


class Stopped(Exception):
    """The run saved a checkpoint and stopped because it was asked to."""


def run(config: Config) -> dict[str, Any]:
    """Train with the configured launcher; the metrics of metrics.json.

    Raises:
        ConfigError, TrainingError, DataError, ModelError: as the workers raised them.
        Stopped: on SIGTERM, after a checkpoint.
    """
    if config.cluster.launcher == "ray":
        return run_with_ray(config)
    return run_in_this_process(config)


def run_in_this_process(config: Config) -> dict[str, Any]:
    """The launchers torchrun (this process is one of its workers) and local (the only one)."""
    quiet_libraries()
    import torch

    from cluster.loop import Preempted
    from cluster.team import join_process_group
    from cluster.worker import train

    team = join_process_group(config.cluster.timeout_s)
    check_world_size(config, team.world_size)
    if team.device.type == "cpu":
        torch.set_num_threads(threads_per_worker(config, int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        return train(config, team)
    except Preempted as stop:
        raise Stopped(str(stop)) from None
    finally:
        torch.distributed.destroy_process_group()


def check_world_size(config: Config, world_size: int) -> None:
    """Raises ConfigError where the launcher's number of workers does not divide the batch by whole identities."""
    identities = config.stage2.identities
    if 2 in config.stages and identities % world_size:
        fits = [n for n in range(1, identities + 1) if identities % n == 0]
        raise ConfigError(f"{world_size} workers do not divide stage2.identities {identities}; possible: {fits}")


def threads_per_worker(config: Config, workers_on_node: int) -> int:
    """Torch's threads on a CPU. Sums round differently with another number of threads, so where a run may move between
    nodes of different sizes, cluster.cpus_per_worker keeps its results the same bit by bit."""
    return config.cluster.cpus_per_worker or max(1, len(os.sched_getaffinity(0)) // workers_on_node)


def quiet_libraries() -> None:
    """Libraries print at import and at start; a user wants to read about the run."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)  # Torch to DeepSpeed's authors, about names to come.
    # None is all others: Ray tells of every report by a logger that it named after a file.
    for name in ("ray.train", "ray.tune", "torch.distributed", None):
        logging.getLogger(name).setLevel(logging.WARNING)


_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Otherwise everything is printed twice.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # Otherwise relative paths change their meaning in the workers.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # A worker behind a silent link never answers.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def run_with_ray(config: Config) -> dict[str, Any]:
    """Place the workers with Ray Train, and start them again from the newest checkpoint when one is lost."""
    quiet_libraries()
    import ray
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from cluster.trainer import Trainer

    run_dir = Storage(config.run.dir)
    run_dir.remove(FAILURE)
    withdraw_stop(config.run.dir)
    _connect(config)
    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) > 0 if config.cluster.gpus_per_worker is None else config.cluster.gpus_per_worker
    low, high = config.cluster.worker_range
    trainer = Trainer(
        _ray_worker,
        sizes=config.allowed_workers(),
        train_loop_config={"config": config.model_dump(mode="json")},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(config.cluster.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=bool(use_gpu),
            resources_per_worker=_resources_per_worker(config, resources, bool(use_gpu)),
            placement_strategy=config.cluster.placement,
        ),
        run_config=RunConfig(
            name=f"start-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=f"{run_dir.url}/ray",
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            # Ray's own story of the run, with a traceback for every lost worker, goes to logs/train of its session.
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    signal.signal(signal.SIGTERM, lambda *_: request_stop(config.run.dir))
    try:
        trainer.fit()
    except Exception as error:
        raise _failure_of(run_dir) or TrainingError(_root_cause(error)) from error
    finally:
        stopped = run_dir.exists(STOP) and read_status(run_dir).get("phase") != "finished"
        withdraw_stop(config.run.dir)
    if failure := _failure_of(run_dir):
        raise failure
    if stopped:
        raise Stopped("stopped as asked, after a checkpoint; the same command goes on from it")
    return run_dir.read_json(METRICS) if run_dir.exists(METRICS) else {}


def _connect(config: Config) -> None:
    """Join the cluster that RAY_ADDRESS names, as it does in a submitted job, or start one on this machine alone."""
    import ray

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    low, high = config.cluster.worker_range
    variables = {"PYTHONPATH": path} | _QUIET
    if low != high:
        # The first try after the loss of a node still counts on it: do not wait for it for the usual minute.
        variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
    options = {"logging_level": "ERROR", "runtime_env": {"env_vars": variables}}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**options)
        return
    # Nothing big goes through Ray's object store: images and features have their own ways.
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, low), object_store_memory=100_000_000, **options)


def _resources_per_worker(config: Config, resources: dict[str, float], use_gpu: bool) -> dict[str, float]:
    """CPUs for a worker and its loaders, as far as the cluster has them; one GPU where it has any."""
    _, high = config.cluster.worker_range
    fair = max(1, int(resources.get("CPU", 1) // high))
    cpus = config.cluster.cpus_per_worker or min(1 + config.data.loaders, fair)
    return {"CPU": cpus} | ({"GPU": 1} if use_gpu else {})


def _ray_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    quiet_libraries()
    import ray.train
    import torch

    from cluster.loop import Drained, Preempted
    from cluster.team import join_process_group
    from cluster.worker import train

    config = parse_config(settings["config"])
    run_dir = Storage(config.run.dir)
    if run_dir.exists(FAILURE):  # Ray started the workers again, but what went wrong would go wrong again.
        return
    team = join_process_group(config.cluster.timeout_s)
    if team.device.type == "cpu":
        torch.set_num_threads(threads_per_worker(config, ray.train.get_context().get_local_world_size()))
    try:
        train(config, team, report=partial(_report_to_ray, run_dir, team.rank))
    except Drained:
        raise  # Ray counts it as the node's doing and starts the workers on other nodes.
    except Preempted:
        return
    except (ConfigError, DataError, ModelError, TrainingError) as error:
        with contextlib.suppress(OSError):  # A full disk, of which the error speaks.
            run_dir.write_json(FAILURE, {"type": type(error).__name__, "message": str(error), "rank": team.rank})
        raise
    except RankLost as error:
        log.error("%s", error)
        raise
    except Exception:
        log.exception("worker %d failed", team.rank)
        raise


def _report_to_ray(run_dir: Storage, rank: int, metrics: dict[str, Any]) -> None:
    """Tell Ray Train of an epoch. Its checkpoint is a pointer to the newest complete one in the run folder: Ray would
    copy the state, and it records a checkpoint only some time after the report."""
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        newest = read_manifests(run_dir)[0][-1:] if rank == 0 else []
        for manifest in newest:
            pointer = {"checkpoint": run_dir.place(f"{FOLDER}/{manifest.name}")}
            (Path(folder) / "pointer.json").write_text(json.dumps(pointer))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder) if newest else None)


def _failure_of(run_dir: Storage) -> Exception | None:
    """What a worker wrote down before it gave up, as the exception it was."""
    if not run_dir.exists(FAILURE):
        return None
    facts = run_dir.read_json(FAILURE)
    kinds = {kind.__name__: kind for kind in (ConfigError, DataError, ModelError, TrainingError)}
    return kinds[facts["type"]](facts["message"])


def _root_cause(error: BaseException) -> str:
    """The workers' own words out of Ray's wrapping, in one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return "; ".join(f"worker {rank}: {_last_line(failure)}" for rank, failure in sorted(failures.items()))
    return _last_line(error)


def _last_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[-1]
