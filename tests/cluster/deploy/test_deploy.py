"""Cluster files: their schemas, the versions and settings they share, and the Slurm script against stand-ins."""

import json
import re
import shlex
import signal
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.settings.yaml_file import load_config
from tests.helpers.deploy import DEPLOY, ROOT, SCRIPT, FakeSlurm, start_script, wait_until

LAUNCHER_FILES = ("ray-up.yaml", "ray-up-onprem.yaml")
README = (DEPLOY / "README.md").read_text()
IMAGE = "REGISTRY/clipreid:{}"
SECRET = "clipreid-ray-token"
S3_ACTIONS = ("ListBucket", "GetObject", "PutObject", "DeleteObject")


def locked(package: str) -> str:
    """The version of a package in requirements.lock."""
    return re.search(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE).group(1)


def load(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def google_cloud() -> dict:
    """ray-up.yaml with the parts that the page replaces for Google Cloud."""
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1)
    return load("ray-up.yaml")[0] | yaml.safe_load(block)


def launcher_configs() -> dict[str, dict]:
    return {name: load(name)[0] for name in LAUNCHER_FILES} | {"google cloud": google_cloud()}


def rayjob() -> dict:
    return load("kuberay-rayjob.yaml")[0]


def ray_pods() -> dict[str, dict]:
    cluster = rayjob()["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


@pytest.mark.parametrize("name", [*LAUNCHER_FILES, "google cloud"])
def test_launcher_file_fits_rays_schema_before_and_after_its_defaults(name):
    config = launcher_configs()[name]
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", [*LAUNCHER_FILES, "google cloud"])
def test_launcher_brings_token_and_locked_environment_to_every_node(name):
    config = launcher_configs()[name]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert config["file_mounts"]["~/clipreid/requirements.lock"] == "requirements.lock"
    assert "make -C ~/clipreid setup" in config["setup_commands"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        start = commands[-1]
        assert "ray start" in start and "RAY_AUTH_MODE=token" in start
        assert '"$HOME/clipreid/.venv/bin:$PATH"' in start
        for command in commands:
            subprocess.run(["bash", "-n", "-c", command], check=True)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", ["ray-up.yaml", "google cloud"])
def test_launcher_makes_two_workers_beside_the_head(name):
    config = launcher_configs()[name]
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert config["available_node_types"]["worker"]["min_workers"] == config["max_workers"] == 2


# The fields of KubeRay's RayJob (ray.io/v1, operator 1.6) that the file uses: their names and types, and nothing else.
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
ANYTHING = {"type": "object"}


def closed(required=(), **properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def many(of: dict) -> dict:
    return {"type": "array", "items": of, "minItems": 1}


CONTAINER = closed(
    ("name", "image", "resources"),
    name=TEXT,
    image=TEXT,
    workingDir=TEXT,
    securityContext=closed(allowPrivilegeEscalation=FLAG, capabilities=closed(drop=many(TEXT))),
    command=many(TEXT),
    env=many(
        closed(
            ("name",),
            name=TEXT,
            value=TEXT,
            valueFrom=closed(secretKeyRef=closed(("name", "key"), name=TEXT, key=TEXT)),
        )
    ),
    ports=many(closed(("containerPort",), containerPort=NUMBER, name=TEXT)),
    resources=closed(("requests",), requests=TEXTS, limits=TEXTS),
    volumeMounts=many(closed(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
)
POD = closed(
    ("containers",),
    containers=many(CONTAINER),
    terminationGracePeriodSeconds=NUMBER,
    affinity=ANYTHING,
    securityContext=closed(
        runAsNonRoot=FLAG, runAsUser=NUMBER, runAsGroup=NUMBER, fsGroup=NUMBER, seccompProfile=closed(type=TEXT)
    ),
    automountServiceAccountToken=FLAG,
    restartPolicy=TEXT,
    volumes=many(
        closed(
            ("name",),
            name=TEXT,
            emptyDir=closed(medium=TEXT, sizeLimit=TEXT),
            persistentVolumeClaim=closed(("claimName",), claimName=TEXT),
        )
    ),
)
TEMPLATE = closed(("spec",), spec=POD)
GROUP = {"rayStartParams": TEXTS, "template": TEMPLATE}
RAYJOB = closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed(("name",), name=TEXT),
    spec=closed(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        backoffLimit=NUMBER,
        shutdownAfterJobFinishes=FLAG,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        ttlSecondsAfterFinished=NUMBER,
        rayClusterSpec=closed(
            ("headGroupSpec", "rayVersion"),
            rayVersion=TEXT,
            authOptions=closed(("mode",), mode={"enum": ["disabled", "token"]}, secretName=TEXT),
            headGroupSpec=closed(("template",), **GROUP),
            workerGroupSpecs=many(
                closed(
                    ("groupName", "minReplicas", "maxReplicas", "template"),
                    groupName=TEXT,
                    replicas=NUMBER,
                    minReplicas=NUMBER,
                    maxReplicas=NUMBER,
                    **GROUP,
                )
            ),
        ),
    ),
)


def test_rayjob_fits_the_custom_resource():
    jsonschema.validate(rayjob(), RAYJOB)


@pytest.mark.parametrize("fault", ["unknown field", "number as start parameter", "unknown mode"])
def test_rayjob_schema_refuses_what_the_custom_resource_refuses(fault):
    job = rayjob()
    cluster = job["spec"]["rayClusterSpec"]
    if fault == "unknown field":
        cluster["authentication"] = "token"
    elif fault == "number as start parameter":
        cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    else:
        cluster["authOptions"]["mode"] = "Token"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAYJOB)


def test_no_pod_runs_as_root_or_can_become_it():
    _, storage_job = load("kuberay-storage.yaml")
    for pod in [*ray_pods().values(), storage_job["spec"]["template"]["spec"]]:
        user = pod["securityContext"]
        assert user["runAsNonRoot"] is True and user["runAsUser"] > 0 and user["seccompProfile"]["type"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert re.search(r"^USER [1-9]\d*$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)


def test_workers_in_the_cloud_may_use_the_bucket_and_nothing_else():
    types = load("ray-up.yaml")[0]["available_node_types"]
    roles = {name: node["node_config"]["IamInstanceProfile"]["Name"] for name, node in types.items()}
    assert roles == {"head": "clipreid-head", "worker": "clipreid-worker"}
    assert "FullAccess" not in README and 'statements=$use; [ $role = worker ] || statements="$use, ' in README
    (bucket,) = re.findall(r"use='(.*?)'\n", README, re.DOTALL)
    assert set(re.findall(r'"(\w+:\w+)"', bucket)) == {f"s3:{act}" for act in S3_ACTIONS}
    accounts = {n: t["node_config"]["serviceAccounts"] for n, t in google_cloud()["available_node_types"].items()}
    assert accounts["worker"][0]["scopes"] == ["https://www.googleapis.com/auth/devstorage.read_write"]
    assert accounts["worker"][0]["email"] != accounts["head"][0]["email"]


def test_uv_and_what_it_installs_come_by_hash():
    lines = subprocess.run(["make", "-n", "-B", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert lines.count("pip install ") == lines.count("--require-hashes") == 3, lines
    (uv,) = re.findall(r"<\((sed .*)\)", lines)
    found = subprocess.run(["bash", "-c", uv], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.startswith(f"uv=={locked('uv')} ") and found.count("--hash=sha256:") > 1 and found.count("==") == 1


def test_rayjob_gives_every_ray_container_the_secret_token_and_the_shared_storage():
    assert rayjob()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": SECRET}
    claim, _ = load("kuberay-storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in ray_pods().values():
        [container] = pod["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        reference = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": SECRET, "key": "auth_token"}
        places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[places["/shared"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert volumes[places["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert f"kubectl create secret generic {SECRET} --from-file=auth_token=" in README


def test_rayjob_leaves_time_for_a_last_checkpoint_before_a_pod_is_killed():
    worker = ray_pods()["gpu"]
    environment = {entry["name"]: entry.get("value") for entry in worker["containers"][0]["env"]}
    assert int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < worker["terminationGracePeriodSeconds"]


def test_demo_data_job_writes_the_shards_that_the_rayjob_reads():
    _, job = load("kuberay-storage.yaml")
    jsonschema.validate(job["spec"]["template"], TEMPLATE)
    container = job["spec"]["template"]["spec"]["containers"][0]
    out = re.search(r"--out (/shared/\S+)", container["command"][-1]).group(1)
    assert f"data.shards={out}" in rayjob()["spec"]["entrypoint"]
    assert container["image"] == ray_pods()["head"]["containers"][0]["image"]


def test_ray_version_is_the_locked_one_everywhere():
    version = locked("ray")
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"ARG BASE=rayproject/ray:{version}-py311\nFROM ${{BASE}}\n" in dockerfile
    assert rayjob()["spec"]["rayClusterSpec"]["rayVersion"] == version
    images = {pod["containers"][0]["image"] for pod in ray_pods().values()}
    assert images == {IMAGE.format(version)}
    for text in (dockerfile, README, (DEPLOY / "kuberay-storage.yaml").read_text()):
        assert set(re.findall(r"REGISTRY/clipreid:(\S+?)[`\s]", text)) == {version}


def test_google_clouds_storage_package_is_of_the_locked_fsspec():
    assert f"gcsfs=={locked('fsspec')}" in google_cloud()["setup_commands"][-1]


@pytest.mark.parametrize("package", ["ray", "jsonschema", "pyyaml", "boto3", "s3fs"])
def test_what_the_cluster_files_need_is_locked(package):
    assert locked(package)


def training_commands() -> list[str]:
    """Every `launch/train.py` command line in the cluster files and their page."""
    texts = [path.read_text() for path in sorted(DEPLOY.iterdir()) if path.suffix != ".py"]
    texts.append(rayjob()["spec"]["entrypoint"])
    joined = "\n".join(texts).replace("\\\n", " ")
    return re.findall(r"(?:launch/train\.py|slurm\.sbatch) +(--config[^\n]*)", joined)


def test_every_training_command_is_one_that_train_py_accepts():
    commands = training_commands()
    assert len(commands) >= 4
    for command in commands:
        _, config, *overrides = shlex.split(command)
        assert load_config(ROOT / config, overrides).cluster.launcher == "ray"
    assert rayjob()["spec"]["entrypoint"].startswith("python launch/train.py --config ")
    assert "python launch/train.py" in SCRIPT.read_text()


def test_nothing_switches_token_authentication_off():
    for path in sorted(DEPLOY.iterdir()):
        modes = re.findall(r"RAY_AUTH_MODE(?:=|, value: )(\w+)", path.read_text())
        assert set(modes) <= {"token"}, path
        assert "disabled" not in path.read_text(), path


def test_page_names_every_file_and_files_that_exist():
    for path in sorted(DEPLOY.iterdir()):
        if path.name not in ("README.md", "Dockerfile.dockerignore", "wait_for_nodes.py", "__pycache__"):
            assert f"`{path.name}`" in README, path.name
    for name in re.findall(r"(?:cluster/deploy|configs|launch)/[\w.-]+\.\w+", README):
        assert (ROOT / name).exists(), name
    for anchor in re.findall(r"\]\(#([\w-]+)\)", README):
        headings = [
            re.sub(r"[^\w -]", "", line).strip().replace(" ", "-").lower()
            for line in README.splitlines()
            if line.startswith("## ")
        ]
        assert anchor in headings


# --- the Slurm script against stand-ins: in which order, with what, and what follows from the job's end

NODE = """
case "$*" in
    getent*) echo "10.0.0.1 STREAM node1" ;;
    "ray start"*) touch joined.$$; exec sleep 600 ;;
    *wait_for_nodes.py*) until [ "$(ls joined.* | wc -l)" -ge "$4" ]; do sleep 0.02; done; exit "${WAIT_CODE:-0}" ;;
    "ray job submit"*) touch submitted; until [ -e ended ]; do sleep 0.02; done ;;
    "ray job stop"*) touch ended ;;
    "ray job status"*) echo "Job 'clipreid-4711' ${STATUS:-succeeded}"; [[ $STATUS != failed ]] ;;
esac
"""


def test_slurm_script_is_bash_and_asks_for_two_nodes():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    options = re.findall(r"^#SBATCH --(.*)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"nodes=2", "ntasks-per-node=1", "requeue", "signal=B:TERM@300"} <= set(options)


def test_slurm_script_starts_head_workers_and_job_in_that_order(tmp_path):
    slurm = FakeSlurm(tmp_path, {"node1": NODE, "node2": NODE, "node3": NODE})
    (tmp_path / "ended").touch()
    script = start_script(tmp_path, slurm, "--config", "a b.yaml", "cluster.workers={min: 1, max: 3}")
    assert script.wait(30) == 0, slurm.log()
    calls = slurm.calls()
    for pair in (slice(2, 4), slice(4, 6)):  # The start of nodes and the wait for them come at the same time.
        calls[pair] = sorted(calls[pair], key=lambda call: "wait_for_nodes" in call)
    shown, address, head, one, workers, three, job, status = calls
    assert shown == "scontrol show hostnames node[1-2]"
    assert address == "node3: getent ahostsv4 node1"
    assert head.startswith("node1: ray start --head --block --node-ip-address=10.0.0.1 --port=6379 ")
    assert one == "node1: python cluster/deploy/wait_for_nodes.py 10.0.0.1:6379 1"
    assert workers.startswith("node2 node3: ray start --block --address=10.0.0.1:6379 ")
    assert three == "node1: python cluster/deploy/wait_for_nodes.py 10.0.0.1:6379 3"
    assert job.startswith("node1: ray job submit --address=http://127.0.0.1:8265 ")
    assert job.endswith("-- python launch/train.py --config a b.yaml cluster.workers={min: 1, max: 3}")
    assert status.startswith("node1: ray job status ")


def test_slurm_script_makes_a_token_for_its_owner_alone_and_keeps_it(tmp_path):
    slurm = FakeSlurm(tmp_path, {"node1": 'echo "$RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH")" > seen\n' + NODE})
    (tmp_path / "ended").touch()
    tokens = []
    for _ in range(2):
        assert start_script(tmp_path, slurm).wait(30) == 0
        path = tmp_path / "secret" / "token"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (tmp_path / "seen").read_text() == f"token {path.read_text()}"
        tokens.append(path.read_text())
    assert tokens[0] == tokens[1] and len(tokens[0].strip()) == 64


@pytest.mark.parametrize("wait_code, status", [("1", "succeeded"), ("0", "failed"), ("0", "was stopped")])
def test_slurm_script_fails_without_requeue_when_nodes_or_job_do_not_come_to_their_end(tmp_path, wait_code, status):
    slurm = FakeSlurm(tmp_path, {"node1": NODE, "node2": NODE})
    (tmp_path / "ended").touch()
    script = start_script(tmp_path, slurm, WAIT_CODE=wait_code, STATUS=status)
    assert script.wait(30) == 1, slurm.log()
    assert not any("requeue" in call for call in slurm.calls())
    assert any("job submit" in call for call in slurm.calls()) == (wait_code == "0")


@pytest.mark.parametrize("status, queues_again", [("was stopped", True), ("failed", True), ("succeeded", False)])
def test_slurm_script_warned_of_its_end_stops_the_job_and_queues_again(tmp_path, status, queues_again):
    slurm = FakeSlurm(tmp_path, {"node1": NODE, "node2": NODE})
    script = start_script(tmp_path, slurm, STATUS=status)
    wait_until((tmp_path / "submitted").exists, 20, script, slurm)
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) == int(queues_again), slurm.log()
    stops = [call for call in slurm.calls() if call.startswith("node1: ray job stop ")]
    assert len(stops) == 1 and stops[0].endswith(" clipreid-4711")
    assert (slurm.calls()[-1] == "scontrol requeue 4711") == queues_again
