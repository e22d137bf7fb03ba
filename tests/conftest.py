"""Settings for every test: quiet libraries, one thread, no network; and which fault tests run."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Processes that tests start find the project and the helpers in the same way.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_addoption(parser):
    parser.addoption("--run-faults", action="store_true", help="run the long fault tests as well")


def pytest_collection_modifyitems(config, items):
    """The long fault tests run on request; one marked `core` as well is in every run."""
    if config.getoption("--run-faults"):
        return
    for item in items:
        if item.get_closest_marker("faults") and not item.get_closest_marker("core"):
            item.add_marker(pytest.mark.skip(reason="a long fault test: make test-faults"))


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
