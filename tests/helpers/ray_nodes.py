"""A Ray cluster whose nodes are network namespaces, for tests that lose nodes or submit jobs to several."""

import os

from tests.helpers.faults import Job
from tests.helpers.runs import BIN, environment


class Nodes:
    """A Ray cluster on the nodes of a network: the first is the head; workers join one by one."""

    def __init__(self, nodes, folder, dashboard=False):
        self.head, *self.spare = nodes
        token = folder / "token"
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        self.environment = environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_ADDRESS=f"{self.head.ip}:6379",
            GLOO_SOCKET_IFNAME="eth0",
            PATH=f"{BIN}:{os.environ['PATH']}",
        )
        self._start(self.head, "--head", "--port=6379", "--num-cpus=0", f"--include-dashboard={dashboard}")
        self.joined = []

    def join(self):
        """One more node with a CPU; it."""
        node = self.spare.pop(0)
        self._start(node, f"--address={self.head.ip}:6379", "--num-cpus=1")
        self.joined.append(node)
        return node

    def _start(self, node, *options):
        command = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={node.ip}", *options]
        with (node.folder / "ray.log").open("w") as log:
            node.start([*command, "--object-store-memory=80000000"], env=self.environment, stdout=log, stderr=log)

    def run(self, *command):
        return self.head.run(command, env=self.environment, check=True).stdout

    def job(self, folder, shards, **changes):
        return Job(folder, shards, self.environment, enter=self.head.command, **changes)
