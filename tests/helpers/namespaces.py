"""Several nodes on one machine: network namespaces on a bridge, each with its own address, host name and /tmp.

    with network(2, tmp_path) as (one, two):
        head = one.start(["ray", "start", "--head", "--block", f"--node-ip-address={one.ip}"])
        two.crash()          # as if the power went
        one.cut_link()       # as if someone pulled the cable: no reset, no goodbye

The bridge has a namespace of its own too, so that nothing of the machine's network changes and several networks with
the same addresses can stand side by side. Only processes inside namespaces made here are ever killed.
"""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TMP = Path("/tmp")

_numbers = itertools.count()

# Runs as root in the node's network, in a mount and a host name space of its own. $1: the node's folder, $2: its
# name, $3: the working folder, then paths to share, "--", and the command.
_ENTER = """
folder=$1 name=$2 work=$3; shift 3
echo "$name" > /proc/sys/kernel/hostname
mount --bind "$folder/../hosts" /etc/hosts
while [ "$1" != -- ]; do
    mkdir -p "$folder/tmp/${1#/tmp/}"
    mount --bind "$1" "$folder/tmp/${1#/tmp/}"
    shift
done
shift
mount --rbind "$folder/tmp" /tmp
cd "$work"
exec "$@"
"""


@functools.cache
def why_unavailable() -> str | None:
    """Why this user may not make namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces need the commands ip and unshare"
    try:
        with tempfile.TemporaryDirectory() as folder, network(1, Path(folder)) as (node,):
            node.run(["true"], check=True)
    except subprocess.CalledProcessError as error:
        return f"network namespaces refused: {(error.stderr or str(error)).strip()}"
    return None


@dataclass
class Node:
    """One machine of the network. Made by `network`."""

    name: str
    """Its host name, which the other nodes can resolve."""
    ip: str
    namespace: str
    hub: str
    """Namespace of the bridge, which holds the other end of this node's cable."""
    folder: Path
    """Holds the node's /tmp."""
    shared: tuple[Path, ...]
    """Paths under /tmp that are the machine's on all nodes: shared storage."""
    processes: list[subprocess.Popen] = field(default_factory=list)

    def command(self, arguments: Sequence[str], cwd: Path | str = ROOT) -> list[str]:
        """The command line that runs `arguments` on this node."""
        shared = [str(path) for path in self.shared]
        inside = ["sh", "-ec", _ENTER, "enter", str(self.folder), self.name, str(cwd), *shared, "--", *arguments]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *inside]

    def run(self, arguments: Sequence[str], cwd: Path | str = ROOT, **options) -> subprocess.CompletedProcess:
        """Run to the end and capture the output as text."""
        return subprocess.run(self.command(arguments, cwd), **({"capture_output": True, "text": True} | options))

    def start(self, arguments: Sequence[str], cwd: Path | str = ROOT, **options) -> subprocess.Popen:
        """Run in the background; ended with the network at the latest."""
        self.processes.append(subprocess.Popen(self.command(arguments, cwd), **options))
        return self.processes[-1]

    def pids(self) -> list[int]:
        """Processes in this node's namespace."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def crash(self) -> None:
        """SIGKILL everything on the node at once. Its connections are reset, as by a machine that comes up again."""
        deadline = time.monotonic() + 20
        # One that was only just started may be on its way into the namespace.
        while (pids := self.pids()) or any(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, f"{self.name}: processes {pids} survive SIGKILL"
            for pid in pids:
                _kill(pid)
            time.sleep(0.05)

    def cut_link(self) -> None:
        """Take the cable's far end down: packets vanish both ways, and nobody is told."""
        _ip("-n", self.hub, "link", "set", self.name, "down")

    def restore_link(self) -> None:
        _ip("-n", self.hub, "link", "set", self.name, "up")


@contextmanager
def network(nodes: int, folder: Path, shared: Sequence[Path] = ()) -> Iterator[list[Node]]:
    """`nodes` machines node1, node2, … with the addresses 10.77.0.1, 10.77.0.2, … on their interface eth0.

    All see the same files, except that each has a /tmp of its own. `folder` holds these; it, the project, the Python
    installation and `shared` stay visible where they lie under /tmp.
    """
    prefix = f"reid{os.getpid()}x{next(_numbers)}"
    hub = f"{prefix}-hub"
    folder = folder.absolute()
    places = [folder, ROOT, Path(sys.prefix), Path(sys.base_prefix), *map(Path, shared)]
    visible = tuple(dict.fromkeys(path for path in places if path.is_relative_to(TMP)))
    made: list[Node] = []
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for number in range(1, nodes + 1):
            name = f"node{number}"
            place = folder / f"{prefix}-nodes" / name
            (place / "tmp").mkdir(parents=True)
            made.append(Node(name, f"10.77.0.{number}", f"{prefix}-{name}", hub, place, visible))
            _connect(made[-1])
        hosts = "".join(f"{node.ip} {node.name}\n" for node in made)
        (folder / f"{prefix}-nodes" / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        yield made
    finally:
        for node in made:
            if Path("/run/netns", node.namespace).exists():
                node.crash()
                _ip("netns", "delete", node.namespace)
        if Path("/run/netns", hub).exists():
            _ip("netns", "delete", hub)
        shutil.rmtree(folder / f"{prefix}-nodes", ignore_errors=True)


def _connect(node: Node) -> None:
    _ip("netns", "add", node.namespace)
    _ip("-n", node.hub, "link", "add", node.name, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
    _ip("-n", node.hub, "link", "set", node.name, "master", "bridge", "up")
    _ip("-n", node.namespace, "link", "set", "lo", "up")
    _ip("-n", node.namespace, "address", "add", f"{node.ip}/24", "dev", "eth0")
    _ip("-n", node.namespace, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
