"""The check before training: two workers that see different things are told apart, and the node is named."""

import json
import re
import socket

import psutil
import pytest

from cluster.checks.preflight import _scattered_virtual_nodes, preflight
from cluster.errors import TrainingError
from cluster.ranks.team import Team
from cluster.settings.yaml_file import load_config, parse_config
from tests.helpers.processes import on_processes
from tests.helpers.runs import config_file, launch, overrides

pytestmark = [pytest.mark.faults, pytest.mark.core]


def checked_on_node2(team, mine, theirs):
    """What pre-flight says where rank 1 has other settings than rank 0."""
    socket.gethostname = lambda: f"node{team.rank + 1}"
    try:
        preflight(parse_config(mine if team.is_first else theirs), team)
    except TrainingError as error:
        return str(error)
    return ""


def preflight_with(tmp_path, tiny_shards, **other):
    mine = load_config(config_file(tmp_path), overrides(tiny_shards, tmp_path / "run")).model_dump(mode="json")
    theirs = json.loads(json.dumps(mine))
    for key, value in other.items():
        section, name = key.split("__")
        theirs[section][name] = str(value)
    return on_processes(2, checked_on_node2, mine, theirs)


def test_the_table_says_what_a_worker_holds_before_there_is_a_model(tiny_shards, tmp_path):
    config = load_config(config_file(tmp_path), overrides(tiny_shards, tmp_path / "run"))
    lines = preflight(config, Team()).splitlines()
    column = next(line for line in lines if "imports" in line).replace("┃", "│").split("│").index(" imports ")
    cells = next(line for line in lines if "cpu" in line and "│" in line).split("│")
    held = float(cells[column].removesuffix(" GB ").strip())
    assert held == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.3)


def test_preflight_names_the_node_without_the_shared_storage(tiny_shards, tmp_path):
    for rank, folder in ((1, tmp_path / "run"), (0, tmp_path / "local" / "run")):  # What earlier starts left.
        (folder / "preflight").mkdir(parents=True)
        (folder / "preflight" / str(rank)).write_text("1")
    for message in preflight_with(tmp_path, tiny_shards, run__dir=tmp_path / "local" / "run"):
        assert "rank 1 on node2: run.dir" in message and "not the same storage" in message


def test_preflight_names_the_node_with_another_dataset(tiny_shards, tmp_path):
    other = tmp_path / "other"
    launch("pack.py", "render", "--out", tmp_path / "images", "--identities", 8, "--images", 4, "--seed", 1)
    launch("pack.py", "build", "--dataset", "veri776", "--root", tmp_path / "images", "--out", other)
    for message in preflight_with(tmp_path, tiny_shards, data__shards=other):
        assert "rank 1 on node2: dataset" in message and "copy the same shards" in message


def test_preflight_names_the_node_whose_cache_cannot_be_written(tiny_shards, tmp_path):
    (tmp_path / "file").touch()
    for message in preflight_with(tmp_path, tiny_shards, data__cache_dir=tmp_path / "file" / "cache"):
        assert (
            "rank 1 on node2: data.cache_dir" in message
            and "Not a directory" in message
            and "that can be written" in message
        )


@pytest.mark.parametrize(
    ("hosts", "virtual", "words"),
    [
        ("aabb", 8, None),
        ("aabbcc", 8, "8 do not fall on 3 nodes"),
        ("abab", 8, r"a: \[0, 2\]; b: \[1, 3\]"),
        ("aaab", 8, r"a: \[0, 1, 2\]; b: \[3\]"),
    ],
)
def test_virtual_nodes_have_to_fall_on_whole_nodes(hosts, virtual, words):
    data = {"shards": "x", "locality": "node", "virtual_nodes": virtual}
    lines = list(_scattered_virtual_nodes(parse_config({"data": data}), list(hosts)))
    assert len(lines) == (words is not None) and (words is None or re.search(words, lines[0]))
    assert not list(_scattered_virtual_nodes(parse_config({"data": data | {"locality": "none"}}), list(hosts)))
