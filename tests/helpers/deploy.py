"""Stand-ins for what cluster/deploy runs on: Slurm's commands, and ssh with rsync, over nodes that a test provides."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
SCRIPT = DEPLOY / "slurm.sbatch"

# As srun does: the command once on each node of --nodelist, signals passed on, the worst exit code at the end.
_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
    case $1 in --nodelist=*) IFS=, read -ra nodes <<< "${1#*=}" ;; esac
    shift
done
echo "${nodes[*]}: $*" >> FOLDER/calls
pids=() ended=
trap 'ended=yes; kill "${pids[@]}" 2> /dev/null' TERM
for node in "${nodes[@]}"; do
    FOLDER/nodes/$node "$@" &
    pids+=($!)
done
[[ $ended ]] && kill "${pids[@]}"
worst=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    while kill -0 "$pid" 2> /dev/null; do wait "$pid" || code=$?; done
    (( code > worst )) && worst=$code
done
exit $worst
"""
_SCONTROL = """#!/bin/bash
echo "scontrol $*" >> FOLDER/calls
case $1 in show) tr ' ' '\\n' <<< "NAMES" ;; esac
"""

# As ssh: options, user@address, and words that the other side's shell puts together.
_SSH = """#!/bin/bash
while [[ $1 != *@* ]]; do shift; done
address=${1#*@}
shift
exec FOLDER/nodes/$address bash -c "$*"
"""
# Of rsync the copy of one file to user@address:path.
_RSYNC = """#!/bin/bash
target=${@: -1}
place=${target%%:*}
FOLDER/nodes/${place#*@} bash -c "cat > ${target#*:}" < "${@: -2:1}"
"""
_MAKE = """#!/bin/bash
echo "$(cat /proc/sys/kernel/hostname): make $*" >> FOLDER/calls
"""


class FakeSlurm:
    """`srun` and `scontrol` in a folder, for the PATH of a batch script.

    `nodes` gives each node's name the shell line that takes a command as "$@" and runs it there.
    """

    def __init__(self, folder: Path, nodes: dict[str, str]):
        self.folder = folder
        self.calls_file = folder / "calls"
        for name, line in nodes.items():
            _executable(folder / "nodes" / name, f"#!/bin/bash\n{line}\n")
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL.replace("NAMES", " ".join(nodes)))):
            _executable(folder / "bin" / name, text.replace("FOLDER", shlex.quote(str(folder))))

    def environment(self, cpus: int = 1, **more: str) -> dict[str, str]:
        """What the batch script finds in its environment on the first node of the allocation."""
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.prefix) / "bin"), os.environ["PATH"]])
        ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": str(cpus)}
        return ours | slurm | {"PATH": path} | more

    def calls(self) -> list[str]:
        """ "NODES: COMMAND" of each srun and "scontrol …", in the order of their start."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def log(self) -> str:
        """What the batch script and its steps wrote."""
        return (self.folder / "log").read_text()


def start_script(folder: Path, slurm: FakeSlurm, *arguments: str, **environment: str) -> subprocess.Popen:
    token = {"RAY_AUTH_TOKEN_PATH": str(folder / "secret" / "token")}
    with open(slurm.folder / "log", "w") as log:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=folder,
            env=slurm.environment(**(token | environment)),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait_until(true, patience_s: float, script: subprocess.Popen, slurm: FakeSlurm) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline and script.poll() is None, slurm.log()
        time.sleep(0.05)


def fake_ssh(folder: Path, nodes: dict[str, str]) -> Path:
    """Folder with `ssh` and `rsync` for a PATH, and a `make` that only notes its call in folder/calls.

    `nodes` gives each node's address the shell line that takes a command as "$@" and runs it there.
    """
    for address, line in nodes.items():
        _executable(folder / "nodes" / address, f"#!/bin/bash\n{line}\n")
    for name, text in (("ssh", _SSH), ("rsync", _RSYNC), ("make", _MAKE)):
        _executable(folder / "bin" / name, text.replace("FOLDER", shlex.quote(str(folder))))
    return folder / "bin"


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
