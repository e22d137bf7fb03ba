"""What ends a run before its time: which rank sees it, and what all of them make of it."""

import os
import signal

import pytest

from cluster.errors import Drained, Preempted
from cluster.run.interrupts import Interrupts, Pending, request_stop, withdraw_stop
from cluster.run.storage import Storage


@pytest.fixture
def run(tmp_path):
    """A run folder. This process takes SIGTERM as before when the test is over."""
    before = signal.getsignal(signal.SIGTERM)
    yield Storage(str(tmp_path))
    signal.signal(signal.SIGTERM, before)


def test_the_stop_file_is_seen_by_the_first_rank_until_it_is_withdrawn(run):
    request_stop(run.url)
    assert Interrupts(run).pending() == Pending(stop=True, drain_poll=False)
    assert not Interrupts(run, is_first=False).pending().stop
    withdraw_stop(run.url)
    assert not Interrupts(run).pending().stop


def test_a_sigterm_is_a_stop_on_the_rank_that_got_it(run):
    interrupts = Interrupts(run, is_first=False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.pending().stop


def test_the_storage_is_not_asked_at_every_step(run, monkeypatch):
    looks = []
    monkeypatch.setattr(run, "exists", looks.append)
    interrupts = Interrupts(run)
    for _ in range(100):
        interrupts.pending()
    assert len(looks) == 1


def test_all_ranks_ask_for_a_drain_notice_when_the_first_says_so_and_it_counts_more_than_a_stop(run, monkeypatch):
    notices = [None, object()]
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: notices.pop(0))
    first, other = (Interrupts(run, is_first=is_first, under_ray=True) for is_first in (True, False))
    assert (first.pending().drain_poll, other.pending().drain_poll) == (True, False)
    assert first.confirm(Pending(stop=True, drain_poll=True)) is Preempted
    assert not first.pending().drain_poll  # not again for a while
    assert other.confirm(Pending(stop=True, drain_poll=True)) is Drained
    assert first.confirm(Pending(stop=False, drain_poll=False)) is None
