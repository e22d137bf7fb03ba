"""What ends a run before its time: which rank sees it, and what all of them make of it."""

import os
import signal

import pytest

from cluster.errors import Drained, Preempted
from cluster.run.interrupts import Interrupts, Pending, request_stop, stop_signals, withdraw_stop
from cluster.run.storage import Storage


@pytest.fixture
def run(tmp_path):
    """A run folder. This process takes SIGTERM and Ctrl-C as before when the test is over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Storage(str(tmp_path))
    for number, handler in before.items():
        signal.signal(number, handler)


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


def test_the_first_ctrl_c_is_a_stop_with_a_word_and_the_second_ends_at_once(run, capsys):
    interrupts = Interrupts(run)
    with stop_signals.saving_first():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending().stop and stop_signals.exit_code == 130
        assert "repeat the command to go on; Ctrl-C again stops at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_at_once_where_no_step_can_be_lost(run):
    interrupts = Interrupts(run)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not interrupts.pending().stop


def test_ctrl_c_after_a_sigterm_is_the_first_and_the_exit_code_is_of_the_last_signal(run):
    Interrupts(run, is_first=False)
    with stop_signals.saving_first():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signals.exit_code == 143
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_signals.exit_code == 130


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
