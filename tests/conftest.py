"""Settings for every test: quiet libraries, one thread, no network; and which fault tests run."""

import contextlib
import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Processes that tests start find the project and the helpers in the same way.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if kernels := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch.compile's cache gives code for another capability's vectors, which then does not build.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{os.getuid()}-{kernels}")


def pytest_addoption(parser):
    parser.addoption("--run-faults", action="store_true", help="run the long fault tests as well")
    parser.addoption("--tolerances", action="store_true", help="print how much of each float32 tolerance was used")
    parser.addoption("--memory", action="store_true", help="print the tests whose process held most; too much fails")


def pytest_configure(config):
    """Workers of xdist are started with this environment, and note in the same folder."""
    from tests.helpers.tolerances import FOLDER

    if config.getoption("--tolerances"):
        os.environ.setdefault(FOLDER, tempfile.mkdtemp(prefix="tolerances-"))


def pytest_terminal_summary(terminalreporter, config):
    from tests.helpers import memory, tolerances

    if config.getoption("--tolerances"):
        terminalreporter.section("largest share used of each tolerance")
        terminalreporter.write_line("\n".join(tolerances.table(os.environ[tolerances.FOLDER])))
    if config.getoption("--memory"):
        ends = [r for rs in terminalreporter.stats.values() for r in rs if getattr(r, "when", "") == "teardown"]
        terminalreporter.section("most memory of a test's process")
        terminalreporter.write_line("\n".join(memory.table(ends)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    from tests.helpers import memory

    if item.config.getoption("--memory"):
        memory.forget_peak()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    from tests.helpers import memory

    report = yield
    if item.config.getoption("--memory") and call.when == "teardown":
        memory.note_peak(report)
    return report


def pytest_collection_modifyitems(config, items):
    """The long fault tests run on request; one marked `core` as well is in every run."""
    if config.getoption("--run-faults"):
        return
    for item in items:
        if item.get_closest_marker("faults") and not item.get_closest_marker("core"):
            item.add_marker(pytest.mark.skip(reason="a long fault test: make test-faults"))


@pytest.fixture(autouse=True)
def memory_given_back(request):
    """What a test of a full-size model has freed goes back to the system, not only to the process: gigabytes."""
    yield
    if request.node.get_closest_marker("slow"):
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    """A small packed dataset for whole runs."""
    from tests.helpers.runs import pack_tiny

    return pack_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ray_head():
    """One Ray head for all whole runs of the session; commands run with this environment join it."""
    from tests.helpers.runs import RayHead

    head = RayHead()
    yield head
    head.stop()
