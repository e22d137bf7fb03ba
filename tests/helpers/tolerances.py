"""Comparisons that rounding takes part in, each noting how much of its tolerance it used.

    pytest --tolerances     prints the largest share used of every tolerance, most used first

How far float32 rounding goes depends on the processor and on the kernels chosen there. A tolerance that is used above
a third on one machine is likely to be missed on another: state the claim in float64, or leave more room.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

FOLDER = "CLIPREID_TEST_TOLERANCES"  # Where the processes of a run, of which xdist has several, leave their notes.
MOST = 1 / 3


def within(error, tolerance, what=""):
    """`error` is at most `tolerance`; NaN is not."""
    error = float(error)
    _note(error / tolerance if tolerance else error, tolerance)
    assert error <= tolerance, f"{what} is {error:.3g} off, {tolerance:.3g} is allowed".strip()


def close(actual, expected, rtol=0.0, atol=0.0, what=""):
    """Every entry is at most `atol` + `rtol` times the expected one away; shapes are the same."""
    actual, expected = _array(actual), _array(expected)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    allowed = atol + rtol * np.abs(expected)
    off = np.abs(actual - expected)
    used = np.divide(off, allowed, out=np.where(off == 0, 0.0, np.inf), where=allowed > 0)
    _note(used.max(initial=0), max(rtol, atol))
    worst = np.unravel_index(np.argmax(used), used.shape) if used.size else ()
    assert (used <= 1).all(), f"{what} {actual[worst]} is not {expected[worst]} ± {allowed[worst]:.3g}".strip()


def _array(value):
    value = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else value
    return np.asarray(value, dtype=np.float64)


def _note(used, tolerance):
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    frame = sys._getframe(2)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].partition("[")[0].partition(" ")[0]
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    with (Path(folder) / str(os.getpid())).open("a") as file:
        file.write(f"{used:.4f}\t{tolerance:.3g}\t{place}\t{test}\n")


def table(folder):
    """Lines of the largest share used of each tolerance, most used first."""
    most = defaultdict(float)
    for line in (line for file in Path(folder).iterdir() for line in file.read_text().splitlines()):
        used, *claim = line.split("\t")
        most[tuple(claim)] = max(most[tuple(claim)], float(used))
    rows = sorted(most.items(), key=lambda row: -row[1])
    return [f"{used:7.4f} of {claim[0]:<8} {' '.join(claim[1:])}{' (!)' * (used > MOST)}" for claim, used in rows]
