"""Ray Train as the launcher: it places the workers and starts them again after a failure.

    Config ──▶ run ──▶ [ray] ──▶ worker.train on every worker ──▶ metrics.json in the run folder

What the workers compute is `worker.train`, which does not know who placed it.
"""

import json
import logging
import os
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, Drained, Preempted, RankLost, TrainingError
from cluster.launchers.local_ray import (
    home_mistake,
    is_local,
    keep_to_loopback,
    local_environment,
    local_options,
    ready_token,
)
from cluster.launchers.placement import shortage, worker_needs
from cluster.launchers.ray_address import cause_of, check_address, within_time
from cluster.ranks.process import QUIET_ENVIRONMENT, joined, quiet_libraries
from cluster.ranks.team import PATIENCE, Team
from cluster.run.interrupts import STOP, request_stop, stop_signals, withdraw_stop
from cluster.run.manifest import FOLDER, read_manifests
from cluster.run.run_folder import read_metrics, read_status
from cluster.run.storage import Storage
from cluster.settings.config import Config
from cluster.settings.paths import PROJECT_ROOT
from cluster.settings.yaml_file import parse_config
from shards.errors import DataError, masked

if TYPE_CHECKING:
    from cluster.launchers.ray_policies import Trainer

log = logging.getLogger(__name__)


def train_with_ray(config: Config) -> dict[str, Any]:
    """Place the workers with Ray Train, and start them again from the newest checkpoint when one is lost.

    Returns the metrics of metrics.json. Raises as `cluster.launchers.run.run`.
    """
    quiet_libraries()
    if is_local():
        keep_to_loopback()
    from cluster.launchers.ray_policies import final_error, warn_of_absent_parts

    warn_of_absent_parts()
    run_dir = Storage(config.run.dir)
    withdraw_stop(config.run.dir)
    _connect(config)
    trainer = _trainer(config, run_dir)
    stop_signals.take(lambda: _stop(config, trainer))
    try:
        with stop_signals.saving_first():
            trainer.fit()
    except Exception as error:
        if trainer.ended:
            raise Preempted("stopped while no worker was running; the same command starts it or goes on") from None
        raise final_error(error) or TrainingError(_root_cause(error, config.cluster.max_failures)) from error
    finally:
        stopped = run_dir.exists(STOP) and read_status(run_dir).get("phase") != "finished"
        withdraw_stop(config.run.dir)
    if stopped:
        raise Preempted("stopped as asked, after a checkpoint; the same command goes on from it")
    return read_metrics(run_dir)


def _trainer(config: Config, run_dir: Storage) -> "Trainer":
    """For the nodes that the cluster has now."""
    import ray
    from ray.train.torch import TorchConfig

    from cluster.launchers.ray_policies import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        Trainer,
    )

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = config.cluster.gpus_per_worker
    use_gpu = any(node.get("GPU", 0) >= 1 for node in nodes) if gpus is None else bool(gpus)
    need = worker_needs(config, nodes, use_gpu)
    if line := shortage(config, nodes, need):
        log.warning("%s", line)
    low, high = config.cluster.worker_range
    return Trainer(
        _ray_worker,
        sizes=config.allowed_workers(),
        train_loop_config={"config": config.model_dump(mode="json")},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(config.cluster.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=use_gpu,
            resources_per_worker=need,
            placement_strategy=config.cluster.placement,
        ),
        run_config=RunConfig(
            name=f"start-{time.strftime('%Y%m%d-%H%M%S')}",
            **ray_storage(run_dir),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            # Ray's own story of the run, with a traceback for every lost worker, goes to logs/train of its session.
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _stop(config: Config, trainer: "Trainer") -> None:
    request_stop(config.run.dir)
    # In a thread: the main one is inside Ray, which asks its controller while it handles the signal.
    threading.Thread(target=trainer.end_unless_running, daemon=True).start()


def ray_storage(run_dir: Storage) -> dict[str, Any]:
    """Where Ray Train keeps its records, in the run folder: through fsspec, as all else, where that is a URL."""
    place = run_dir.place("ray")
    if run_dir.local_root is not None:
        return {"storage_path": place}
    from fsspec.core import url_to_fs
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = url_to_fs(place)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(files))}


def _connect(config: Config) -> None:
    """As `_join_or_start`. Raises ConfigError, one line, where that fails for whatever reason."""
    address = os.environ.get("RAY_ADDRESS")
    if address is not None:
        check_address(address)
    try:
        _join_or_start(config)
    except PermissionError as error:
        raise home_mistake(error.filename, error.strerror) from None
    except (ConfigError, DataError):
        raise
    except Exception as error:  # Ray raises whatever its parts do.
        what = "started on this machine" if address is None else f"joined at RAY_ADDRESS={masked(address)}"
        remedy = "look for a full disk, memory or /dev/shm" if address is None else "start the cluster, or unset it"
        raise ConfigError(
            f"Ray could not be {what} ({type(error).__name__}: {cause_of(str(error))}): {remedy}, or set "
            "cluster.launcher=local, which needs none"
        ) from error


def _join_or_start(config: Config) -> None:
    """Join the cluster that RAY_ADDRESS names, as it does in a submitted job, or start one on this machine alone."""
    import ray

    options: dict[str, Any] = {"logging_level": "ERROR", "runtime_env": {"env_vars": _variables(config)}}
    ready_token()
    if not is_local():
        with within_time(f"RAY_ADDRESS={masked(os.environ['RAY_ADDRESS'])}"):
            ray.init(**options)
        return
    # Workers started ahead lack our environment variables and would never be used.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Nothing big goes through Ray's object store: images and features have their own ways.
    cpus = max(os.cpu_count() or 1, config.cluster.worker_range[0])
    ray.init(num_cpus=cpus, object_store_memory=100_000_000, **local_options(), **options)


def _variables(config: Config) -> dict[str, str]:
    """The environment of controller and workers. What a user has set there already stays."""
    path = os.pathsep.join([str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ours = QUIET_ENVIRONMENT | (local_environment() if is_local() else {})
    low, high = config.cluster.worker_range
    if low != high:
        # The first try after the loss of a node still counts on it: do not wait for it for the usual minute.
        ours["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
    return {"PYTHONPATH": path} | {name: os.environ.get(name, value) for name, value in ours.items()}


def _ray_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    import ray

    from cluster.launchers.ray_policies import FINAL

    config = parse_config(settings["config"])
    cpus = int(ray.get_runtime_context().get_assigned_resources()["CPU"])
    with joined(config.cluster.timeout_s, cpus) as team:
        from cluster.training.worker import train

        try:
            train(config, team, report=partial(_report_to_ray, Storage(config.run.dir), team))
        except (Drained, *FINAL):
            raise  # What comes of them is `RestartPolicy`'s to decide.
        except Preempted:
            return
        except RankLost as error:
            log.error("%s", error)
            raise
        except Exception:
            log.exception("worker %d failed", team.rank)
            raise


def _report_to_ray(run_dir: Storage, team: Team, metrics: dict[str, Any]) -> None:
    """Report an epoch to Ray Train. Its checkpoint is a pointer to the newest complete one in the run folder: Ray would
    copy the state, and it records a checkpoint only some time after the report."""
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        newest = read_manifests(run_dir)[0][-1:] if team.is_first else []
        for manifest in newest:
            pointer = {"checkpoint": run_dir.place(f"{FOLDER}/{manifest.name}")}
            (Path(folder) / "pointer.json").write_text(json.dumps(pointer))
        with team.within("report to Ray", PATIENCE):
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder) if newest else None)


def _root_cause(error: BaseException, max_failures: int) -> str:
    """The workers' own messages out of Ray's wrapping, in one line."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return cause_of(str(error))
    messages = "; ".join(f"worker {rank}: {cause_of(str(failure))}" for rank, failure in sorted(failures.items()))
    return (
        f"{messages}; given up after {max_failures} restarts: repeat the command, which goes on from the newest "
        "checkpoint; cluster.max_failures allows for more"
    )
