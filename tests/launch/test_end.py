"""How a command ends: with its exit code, whatever the libraries' threads are still at."""

import signal
import subprocess
import sys

from tests.helpers.runs import ROOT, environment

BUSY_THREADS = """
import sys
import torch, torch.distributed as dist
from launch.cli import end

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(20):
    tensor = torch.ones(2_000_000)  # gloo's thread is the last to hold it, and frees it with Python's help
    dist.all_gather([torch.empty_like(tensor)], tensor, async_op=True)
print("done")
"""


def ends_as(how):
    command = [sys.executable, "-c", BUSY_THREADS + how]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_a_thread_of_gloo_that_still_frees_tensors_does_not_change_the_exit_code():
    for _ in range(3):
        ended = ends_as("end(3)")
        assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done\n", "")


def test_pythons_own_end_aborts_there():
    """The reason for `end`. Where this fails, `end` can go."""
    assert any(ends_as("sys.exit(3)").returncode == -signal.SIGABRT for _ in range(5))


def test_exit_functions_run_before_the_end():
    ended = ends_as("import atexit; atexit.register(print, 'exit function'); end(0)")
    assert (ended.returncode, ended.stdout) == (0, "done\nexit function\n")
