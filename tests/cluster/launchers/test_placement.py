"""What a worker gets of a node, and what a user reads when the nodes have no room. No cluster is started."""

import pytest

from cluster.errors import ConfigError
from cluster.launchers.placement import room_for, shortage, worker_needs
from cluster.launchers.ray import _connect
from cluster.settings.yaml_file import parse_config
from cluster.training.worker import fit_loaders

NODES = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 5.0, "GPU": 1.0}, {"CPU": 2.0}]


def config(loaders=2, **cluster):
    return parse_config({"data": {"shards": "x", "loaders": loaders}, "cluster": cluster})


@pytest.mark.parametrize(
    ("placement", "cpus", "gpus"), [("PACK", 7, 3), ("SPREAD", 7, 3), ("STRICT_SPREAD", 3, 2), ("STRICT_PACK", 4, 2)]
)
def test_room_is_counted_by_whole_workers_and_by_placement(placement, cpus, gpus):
    assert room_for(NODES, {"CPU": 2.0}, placement) == cpus
    assert room_for(NODES, {"CPU": 2.0, "GPU": 1.0}, placement) == gpus


@pytest.mark.parametrize(
    ("settings", "nodes", "use_gpu", "cpus"),
    [
        ({"workers": 2}, NODES, True, 3),
        ({"workers": 2, "cpus_per_worker": 7}, NODES, True, 7),
        ({"workers": 2}, [{"CPU": 4.0, "GPU": 2.0}], True, 2),
        ({"workers": 2}, [{"CPU": 8.0}], False, 4),
        ({"workers": 2, "placement": "STRICT_SPREAD"}, [{"CPU": 8.0}, {"CPU": 3.0}], False, 3),
        ({"workers": {"min": 1, "max": 4}}, [{"CPU": 8.0}], False, 2),
        ({"workers": {"min": 1, "max": 8}}, [{"CPU": 2.0, "GPU": 1.0}], True, 2),
        ({"workers": 4}, [{"CPU": 2.0}], False, 1),
        ({"workers": 4}, [{"CPU": 2.0}], True, 3),
    ],
)
def test_a_worker_gets_cpus_for_its_loaders_or_without_gpus_its_share(settings, nodes, use_gpu, cpus):
    need = worker_needs(config(**settings), nodes, use_gpu)
    assert need == ({"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus})


def test_workers_that_cannot_be_placed_are_told_with_what_is_there_and_what_to_change():
    asked = config(workers=4)
    assert shortage(asked, NODES, {"CPU": 2.0}) is None
    line = shortage(asked, NODES, {"CPU": 2.0, "GPU": 1.0})
    assert "4 workers with 2 CPU and 1 GPU each" in line and "8 CPU and 2 GPU; 5 CPU and 1 GPU; 2 CPU and 0 GPU" in line
    assert "room for 3" in line and "change cluster.workers" in line
    assert shortage(config(workers={"min": 2, "max": 8}), NODES, {"GPU": 1.0}) is None


def test_a_worker_has_no_more_loaders_than_cpus():
    assert [fit_loaders(config(loaders=3), cpus).data.loaders for cpus in (1, 3, 8, None)] == [1, 3, 3, 3]


def test_a_home_folder_that_ray_may_not_write_is_named_with_the_remedy(monkeypatch):
    """A container started for a user that it does not know."""

    def init(**options):
        raise PermissionError(13, "Permission denied", "/nonexistent")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(ConfigError, match="/nonexistent .*: set HOME to a folder of yours"):
        _connect(parse_config({"data": {"shards": "x"}}))
