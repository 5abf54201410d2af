"""Admission control without an engine."""

from __future__ import annotations

import time

import pytest

from camserve_server.engine.admission import Admission, Caller, Claim
from camserve_server.errors import Expired, QueueFull, Unavailable


def test_idle_server_admits_any_request() -> None:
    admission = Admission(10)
    admission.admit(1, Claim(1_000_000), 0.0)
    assert (len(admission), admission.rows_owed()) == (1, 1_000_000)
    admission.release(1)
    assert (len(admission), admission.rows_owed()) == (0, 0)


def test_retry_delay_is_the_time_until_the_request_fits() -> None:
    admission = Admission(100)
    admission.admit(1, Claim(80), 0.0)
    with pytest.raises(QueueFull) as caught:
        admission.admit(2, Claim(70), 5.0)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s == pytest.approx((70 + 70 - 100) / 5.0)
    admission.set_rows_owed(1, 30)  # the rows of that time and ten more are done
    admission.admit(2, Claim(70), 5.0)


def test_owed_rows_count_by_their_priority() -> None:
    admission = Admission(100)
    admission.admit(1, Claim(10_000, priority="low"), 0.0)
    admission.admit(2, Claim(32, priority="high"), 0.0)  # 32 / 256 rows of the first request run before it
    with pytest.raises(QueueFull, match="this request and the rows before it are 101 rows; max_rows_owed is 100;"):
        admission.admit(3, Claim(65), 0.0)  # 65 / 16 rows of the first request and all rows of the second run before it
    admission.release(2)
    admission.admit(3, Claim(65), 0.0)


def test_quota_limits_the_rows_of_one_caller() -> None:
    admission, one, other = Admission(1000), Caller("one", 100), Caller("other", 100)
    admission.admit(1, Claim(5000, caller=one), 0.0)  # the first request of a caller may have any length
    with pytest.raises(QueueFull, match="this caller owes 5000 rows") as caught:
        admission.admit(2, Claim(1, caller=one), 10.0)
    assert caught.value.reason == "QUOTA_EXCEEDED"
    assert caught.value.retry_after_s == 60.0
    admission.admit(2, Claim(100, caller=other), 0.0)
    admission.set_rows_owed(1, 40)
    admission.admit(3, Claim(60, caller=one), 0.0)
    admission.admit(4, Claim(10), 0.0)  # an unnamed caller without a quota


def test_deadline_that_earlier_rows_make_unreachable_is_refused() -> None:
    admission = Admission(1_000_000)
    deadline = time.monotonic() + 1000
    admission.admit(1, Claim(900), 0.0)
    with pytest.raises(Expired, match="needs 600 rows and 600 rows run before them") as caught:
        admission.admit(2, Claim(600, 600, 1.0, deadline), 0.0)
    assert caught.value.reason == "DEADLINE_UNREACHABLE"
    assert "at least 1200 s, but the deadline is in 1000 s" in caught.value.message
    assert caught.value.retry_after_s == 60.0
    assert len(admission) == 1
    admission.admit(2, Claim(600, 600, 1.0, deadline, priority="high"), 0.0)
    admission.admit(3, Claim(600, 100, 1.0, deadline), 0.0)  # a request that can stop early
    admission.admit(4, Claim(600, 600, 0.0, deadline), 0.0)  # a model without a measured rate


@pytest.mark.parametrize(
    ("rows", "left_s", "message"),
    [(300, 250, "300 s, but the deadline is in 250 s"), (2, 1.5, "2.0 s, but the deadline is in 1.5 s")],
)
def test_seconds_have_no_exponent_and_the_missing_time_is_the_retry_delay(
    rows: int, left_s: float, message: str
) -> None:
    with pytest.raises(Expired, match=message) as caught:
        Admission(1_000_000, clock=lambda: 5.0).admit(1, Claim(rows, rows, 1.0, 5.0 + left_s), 0.0)
    assert caught.value.retry_after_s == pytest.approx(rows - left_s)


def test_closed_admission_refuses_every_request() -> None:
    admission = Admission(10)
    admission.close()
    with pytest.raises(Unavailable):
        admission.admit(1, Claim(1), 0.0)


def test_devices_share_the_limit_of_rows_and_the_quotas() -> None:
    admission, one = Admission(100), Caller("one", 50)
    admission.admit(1, Claim(40, caller=one), 4.0, "a")
    admission.admit(2, Claim(40), 6.0, "b")
    assert (admission.rows_owed("a"), admission.rows_owed("b")) == (40, 40)
    with pytest.raises(QueueFull, match="this request and the rows before it are 120 rows") as caught:
        admission.admit(3, Claim(40), 6.0, "b")
    assert caught.value.retry_after_s == pytest.approx((120 - 100) / (4.0 + 6.0)), "both devices work on the rows"
    with pytest.raises(QueueFull, match="this caller owes 40 rows"):
        admission.admit(3, Claim(20, caller=one), 6.0, "b")


def test_deadline_depends_on_the_rows_of_its_device() -> None:
    admission = Admission(1_000_000, clock=lambda: 0.0)
    admission.admit(1, Claim(900), 1.0, "a")
    with pytest.raises(Expired, match="needs 600 rows and 600 rows run before them"):
        admission.admit(2, Claim(600, 600, 1.0, 1000.0), 1.0, "a")
    admission.admit(2, Claim(600, 600, 1.0, 1000.0), 1.0, "b")


def test_closed_device_refuses_requests_and_the_others_do_not() -> None:
    admission = Admission(10)
    admission.close("a")
    with pytest.raises(Unavailable):
        admission.admit(1, Claim(1), 1.0, "a")
    admission.admit(1, Claim(1), 1.0, "b")
