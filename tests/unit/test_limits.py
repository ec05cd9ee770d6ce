"""Templates that do not end."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from nemo_minitron.runtime.limits import time_limit


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_a_block_is_ended():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took more than 0\.2 seconds"), time_limit(0.2):
        spin(30)
    assert time.monotonic() - started < 10


def test_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(30):
        pass
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_timer_that_runs_goes_on():
    fired = []
    handler = signal.signal(signal.SIGALRM, lambda *_: fired.append(time.monotonic()))
    left = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with time_limit(30):
            pass
        spin(0.6)
        assert len(fired) == 1
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_other_threads_have_no_limit():
    ended = []

    def work() -> None:
        with time_limit(0.01):
            spin(0.1)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended
