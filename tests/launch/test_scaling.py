"""What `bench.py scale` and `bench.py cluster` count and compute."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from launch.scaling.prediction import Counted, Network, Payload, Worker, predicted
from launch.scaling.resume import checkpoint_and_resume
from launch.scaling.stages import Case, measure
from launch.scaling.traffic import Traffic
from tests.helpers.processes import on_processes

TINY = "configs/models/tiny_vit.json"


def _sent(team):
    """Bytes of each collective, of tensors of 60 bytes; rank 0 has 3 rows for rank 1 and 1 for itself."""
    own, whole = torch.ones(15), torch.ones(30)
    rows = torch.ones(4 if team.rank == 0 else 2, 5, requires_grad=True)
    send, receive = ([1, 3], [1, 1]) if team.rank == 0 else ([1, 1], [3, 1])
    calls = {
        "all_reduce": lambda: dist.all_reduce(own),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, own),
        "all_gather of a list": lambda: dist.all_gather([own.clone(), own.clone()], own),
        "equal all_to_all": lambda: dist.all_to_all_single(whole, torch.ones(30)),
        "broadcast": lambda: dist.broadcast(own, 0),
        "barrier": dist.barrier,
        "rows there and their gradients back": lambda: team.all_to_all(rows, send, receive).sum().backward(),
    }
    counted = {}
    for name, call in calls.items():
        with Traffic() as traffic:
            call()
        counted[name] = traffic.sent_bytes
    return counted


def test_bytes_are_those_that_the_rules_say_whatever_calls_the_collective():
    first, second = on_processes(2, _sent)
    alike = {"all_reduce": 60, "all_gather": 60, "all_gather of a list": 60, "equal all_to_all": 60, "broadcast": 30}
    rows = "rows there and their gradients back"
    assert first == {**alike, "barrier": 0, rows: (3 + 1) * 20}
    assert second == {**alike, "barrier": 0, rows: (1 + 3) * 20}


def _calls(team):
    return measure(team, Case(1, 1000, 16, TINY, (32, 32)), 1)["calls"]


def test_a_step_of_stage_1_takes_five_collectives_and_gathers_no_image_features():
    """Tokens to who encodes them, and gradients back; texts to all, and gradients back; loss parts."""
    expected = {"all_to_all": 3, "all_gather": 1, "all_reduce": 1}
    for calls in on_processes(2, _calls):
        assert {kind: count for kind, count in calls.items() if count} == expected


def test_a_collective_without_a_rule_is_an_error():
    class Operator:
        namespace = "c10d"

        def name(self):
            return "c10d::new_collective_"

    with pytest.raises(KeyError, match="new_collective_"):
        Traffic().__torch_dispatch__(Operator(), ())


def test_the_fit_gives_back_what_it_was_fitted_to():
    payload = Payload(constant=1000.0, per_image=30.0, calls={})
    counts = [(images, {"sent_bytes": payload.sent_bytes(2, images), "calls": {}}) for images in (16, 32)]
    assert Payload.fitted(2, *counts) == payload
    worker = Worker(fixed_s=0.01, image_s=0.002, pair_s=1e-5, logit_s=0.0005, table_s=0.3)
    work = {images: 100 + int(4e6) * images + 20_000 * images**2 for images in (16, 64, 128)}
    counted = Counted.fitted(work, 64, work[64] + 64 * 1_000_000, table_bytes=0)
    assert vars(counted) == pytest.approx(vars(Counted(4e6, 20_000, 1e6, 0)))
    few = {images: replace(worker, logit_s=0, table_s=0).seconds(1, images) for images in (16, 64)}
    fitted = counted.worker(few, 64, worker.seconds(1, 64))
    assert vars(fitted) == pytest.approx(vars(worker))


def test_efficiency_is_one_without_a_network_and_a_constant_and_falls_with_either():
    free, slow = Network(1e9, 0.0), Network(1.0, 1e-3)
    payload = Payload(1e6, 1e3, {"all_reduce": 1})
    pure, constant = Worker(0.0, 1e-3, 0.0, 0.0, 1.0), Worker(0.1, 1e-3, 0.0, 0.0, 1.0)

    def efficiency(worker, network, weak=False):
        rows = predicted(1, worker, payload, network, images=512, weak=weak, most_ranks=8)
        return [row["efficiency"] for row in rows]

    assert efficiency(pure, free) == [1, 1, 1, 1]
    for lower in (efficiency(constant, free), efficiency(pure, slow)):
        assert lower == sorted(lower, reverse=True) and lower[0] == 1 and lower[-1] < 0.95


def test_a_checkpoint_of_two_ranks_is_gone_on_from_by_one_with_the_same_loss(tmp_path):
    result = checkpoint_and_resume(Case(2, 1000, 16, TINY, (32, 32)), 2, str(tmp_path), (2, 1))
    losses = [result[name]["loss_after_checkpoint"] for name in ("trained", "resumed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert result["trained"]["within"] and result["resumed"]["ranks"] == 1
