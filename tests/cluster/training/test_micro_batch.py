"""A run whose encoder takes a few images at a time logs the losses of one that takes all, on two workers too."""

import pytest

from tests.helpers.precision import make_stage, train
from tests.helpers.processes import on_processes
from tests.helpers.shards import write_shards
from tests.helpers.tolerances import close


def logged(team, folder, zero_stage, micro_batch):
    changes = {"train.micro_batch": micro_batch, "train.zero_stage": zero_stage, "stage2.lr": 1e-4}
    stage = make_stage(team, folder, **changes)
    log, newest, message = train(team, stage, f"{folder}/{zero_stage}-{micro_batch}")
    stage.close()
    assert message == "" and newest is not None
    return [[entry[name] for name in ("id", "triplet", "text", "loss")] for entry in log]


def of_all_zero_stages(team, folder):
    return {zero: [logged(team, folder, zero, size) for size in (None, 3)] for zero in (0, 1, 2)}


@pytest.mark.slow
def test_a_run_in_pieces_logs_the_losses_of_a_run_at_once_under_every_zero_stage(tmp_path):
    write_shards(tmp_path / "shards", {"train": {f"t{n}": 4 for n in range(16)}})
    for found in on_processes(2, of_all_zero_stages, str(tmp_path), timeout_s=120):
        for whole, pieces in found.values():
            assert len(whole) == len(pieces) >= 4
            close(pieces, whole, rtol=1e-4)
