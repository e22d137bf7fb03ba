"""Wait until a Ray cluster has as many nodes as it should, between `ray start` on the nodes and `ray job submit`.

    python cluster/deploy/wait_for_nodes.py 10.0.0.1:6379 2

Exits with 1 where they have not all come in time.
"""

import logging
import sys
import time

import ray

PATIENCE_S = 300.0


def wait_for_nodes(address: str, wanted: int) -> int:
    """Connect to the head at `address` (host:port), however late it comes up. The exit code."""
    deadline = time.monotonic() + PATIENCE_S
    alive: list[str] = []
    cause = ""
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(address=address, logging_level=logging.ERROR)
            alive = sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])
        except ConnectionError as error:
            cause = str(error).strip().split("\n")[0]
        if len(alive) >= wanted:
            print(f"{len(alive)} of {wanted} nodes: {', '.join(alive)}", flush=True)
            return 0
        time.sleep(1)
    print(
        f"error: {len(alive)} of {wanted} nodes at {address} after {PATIENCE_S:.0f} s: {', '.join(alive) or cause}. "
        "The others cannot reach that address, or hold another token in RAY_AUTH_TOKEN_PATH.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(wait_for_nodes(sys.argv[1], int(sys.argv[2])))
