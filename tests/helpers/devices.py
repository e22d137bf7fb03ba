"""Where tests marked `gpu` run: on the GPU, and skipped without one.

GPU_TESTS_ON=cpu pytest -m gpu     rehearses them on the CPU, for the day when there is a GPU for a few minutes
"""

import os
from contextlib import contextmanager

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
_absent = DEVICE == "cuda" and not torch.cuda.is_available()
_marks = [pytest.mark.gpu, pytest.mark.skipif(_absent, reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param(DEVICE, marks=_marks, id="gpu")]
"""For tests that run on both."""


def on_gpu(test):
    """For a test that needs `DEVICE`."""
    for mark in _marks:
        test = mark(test)
    return test


@contextmanager
def no_synchronisation():
    """Within it every operation that makes the host wait for the GPU is an error."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
