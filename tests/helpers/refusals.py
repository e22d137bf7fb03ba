"""Ways in which the operating system refuses: no space, read-only, no permission, open files, long names, no folder.

Each is a context manager for a folder that commands write into; it gives the place that a result is to have there.
"""

import ctypes
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.faults import small_disk

DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2
CAPABILITIES_VERSION = 0x20080522


@contextmanager
def no_space(folder, left=0):
    """left: bytes, so that the disk is full only after something was written."""
    with small_disk(folder / "full", "64k") as disk:
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - left))
        yield disk / "out"


def little_space(folder):
    return no_space(folder, left=12 << 10)


@contextmanager
def read_only(folder):
    with small_disk(folder / "ro", "64k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk / "out"


@contextmanager
def no_permission(folder):
    (folder / "others").mkdir(mode=0o500)
    with bound_by_modes():
        yield folder / "others" / "out"


@contextmanager
def bound_by_modes():
    """Root may read and write everywhere; so it gives that up meanwhile."""
    before = _effective_capabilities()
    _set_effective(before & ~(1 << DAC_OVERRIDE) & ~(1 << DAC_READ_SEARCH))
    try:
        yield
    finally:
        _set_effective(before)


@contextmanager
def too_many_open_files(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))  # one at a time
    try:
        yield folder / "out"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def name_too_long(folder):
    yield folder / ("x" * 256)


@contextmanager
def vanished_folder(folder):
    """The folder that the command is called in is removed before it starts."""
    before, gone = Path.cwd(), folder / "gone"
    gone.mkdir()
    os.chdir(gone)
    shutil.rmtree(gone)
    try:
        yield "out"
    finally:
        os.chdir(before)


WAYS = (no_space, read_only, no_permission, too_many_open_files, name_too_long, vanished_folder)


def _capabilities():
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: the lower 32, then the upper
    if ctypes.CDLL(None, use_errno=True).capget(header, data):
        pytest.skip("capabilities cannot be read here")
    return header, data


def _effective_capabilities():
    return _capabilities()[1][0]


def _set_effective(lower):
    header, data = _capabilities()
    data[0] = lower
    assert ctypes.CDLL(None, use_errno=True).capset(header, data) == 0
