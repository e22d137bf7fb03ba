"""A power loss at any moment, which leaves of every file that was not flushed to the disk nothing, zeros or a part: the
run goes on bitwise from the newest checkpoint that was said to be there, or one line says what is lost."""

from itertools import product

import pytest

from cluster.errors import ConfigError
from cluster.run.manifest import FOLDER
from shards import storage
from tests.helpers.checkpoints import loaded, save, writer_at
from tests.helpers.damage import TORN, Disk


def test_after_a_power_loss_at_any_moment_a_run_goes_on_from_the_last_complete_checkpoint(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with Disk(run).watched() as disk:
        for step in (3, 5, 7, 9):
            save(writer_at(run, keep=1), step)
            disk.safe = step
    tried = 0
    for safe, folder in disk.outcomes(tmp_path / "after"):
        tried += 1
        if safe is None and not any((folder / FOLDER).glob("*/manifest.json")):
            continue
        step, value = loaded(folder)
        assert value == step and step >= (safe or 0), (safe, folder)
    assert tried > 40


def test_a_disk_that_is_never_flushed_would_lose_checkpoints(tmp_path, monkeypatch):
    """That the test above sees it."""
    monkeypatch.setattr(storage, "sync", lambda descriptor: None)
    run = tmp_path / "run"
    run.mkdir()
    with Disk(run).watched() as disk:
        for step in (3, 5):
            save(writer_at(run, keep=1), step)
            disk.safe = step
    lost = 0
    for safe, folder in disk.outcomes(tmp_path / "after"):
        try:
            lost += safe is not None and loaded(folder)[0] < safe
        except (ConfigError, AttributeError):
            lost += safe is not None
    assert lost


STATES = ("whole", *TORN)


@pytest.mark.parametrize("newest", product(STATES, STATES))
def test_of_two_checkpoints_torn_in_every_way_the_newest_whole_one_is_taken_or_one_line_names_them(tmp_path, newest):
    """(manifest, weights) of each."""
    save(writer_at(tmp_path), 3, 7)
    folders = sorted((tmp_path / FOLDER).iterdir())
    names = ("manifest.json", "rank-0-of-1.safetensors")
    contents = {folder / name: (folder / name).read_bytes() for folder in folders for name in names}
    for older in product(STATES, STATES):
        for folder, states in zip(folders, (older, newest), strict=True):
            for name, state in zip(names, states, strict=True):
                content = contents[folder / name]
                (folder / name).write_bytes(TORN[state](content) if state in TORN else content)
        whole = [step for step, states in ((3, older), (7, newest)) if states == ("whole", "whole")]
        if whole:
            assert loaded(tmp_path) == (max(whole), float(max(whole)))
        else:
            with pytest.raises(ConfigError, match=r"none can be used \(.*to begin anew$") as caught:
                loaded(tmp_path)
            assert "\n" not in str(caught.value) and all(folder.name in str(caught.value) for folder in folders)
