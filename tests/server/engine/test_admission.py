"""Who is let in, alone: no engine."""

from __future__ import annotations

import time

import pytest

from camserve_server.engine.admission import Admission, Caller, Claim
from camserve_server.errors import Expired, QueueFull, Unavailable


def test_an_idle_server_takes_any_request() -> None:
    admission = Admission(10)
    admission.admit(1, Claim(1_000_000), 0.0)
    assert (len(admission), admission.rows_owed()) == (1, 1_000_000)
    admission.release(1)
    assert (len(admission), admission.rows_owed()) == (0, 0)


def test_the_wait_that_is_named_is_the_one_after_which_there_is_room() -> None:
    admission = Admission(100)
    admission.admit(1, Claim(80), 0.0)
    with pytest.raises(QueueFull) as caught:
        admission.admit(2, Claim(70), 5.0)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s == pytest.approx((70 + 70 - 100) / 5.0)
    admission.set_rows_owed(1, 30)  # so many have been done in that time, and ten more
    admission.admit(2, Claim(70), 5.0)


def test_rows_of_lower_priority_hardly_count_and_those_of_higher_all_do() -> None:
    admission = Admission(100)
    admission.admit(1, Claim(10_000, priority="low"), 0.0)
    admission.admit(2, Claim(32, priority="high"), 0.0)  # 32 / 256 rows of the first go before it
    with pytest.raises(QueueFull, match="36 rows run before the 65"):
        admission.admit(3, Claim(65), 0.0)  # 65 / 16 rows of the first, and all of the second
    admission.release(2)
    admission.admit(3, Claim(65), 0.0)


def test_a_caller_has_a_limit_of_its_own() -> None:
    admission, one, other = Admission(1000), Caller("one", 100), Caller("other", 100)
    admission.admit(1, Claim(5000, caller=one), 0.0)  # the only one of the caller: however long
    with pytest.raises(QueueFull, match="this caller owes 5000 rows") as caught:
        admission.admit(2, Claim(1, caller=one), 10.0)
    assert caught.value.reason == "QUOTA_EXCEEDED"
    assert caught.value.retry_after_s == 60.0
    admission.admit(2, Claim(100, caller=other), 0.0)
    admission.set_rows_owed(1, 40)
    admission.admit(3, Claim(60, caller=one), 0.0)
    admission.admit(4, Claim(10), 0.0)  # who has no name has no limit


def test_a_deadline_that_the_rows_before_make_impossible_is_refused() -> None:
    admission = Admission(1_000_000)
    soon = time.monotonic() + 1.0
    admission.admit(1, Claim(900), 0.0)
    with pytest.raises(Expired, match="needs 600 rows and 600 rows run before them") as caught:
        admission.admit(2, Claim(600, 600, 1000.0, soon), 0.0)
    assert caught.value.reason == "DEADLINE_UNREACHABLE"
    assert len(admission) == 1
    admission.admit(2, Claim(600, 600, 1000.0, soon, priority="high"), 0.0)
    admission.admit(3, Claim(600, 100, 1000.0, soon), 0.0)  # it can stop early
    admission.admit(4, Claim(600, 600, 0.0, soon), 0.0)  # nobody knows


def test_nobody_is_let_in_once_it_is_closed() -> None:
    admission = Admission(10)
    admission.close()
    with pytest.raises(Unavailable):
        admission.admit(1, Claim(1), 0.0)
