"""A gateway that performs workitems, and is killed: each workitem is claimed once and completed once."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from camserve_server.service.server import Server
from tests.dicom import gateways
from tests.dicom.gateways import Spooled, forked
from tests.dicom.pacs import Pacs, image, wait_until
from tests.dicom.test_gateway_worklist import is_over, outputs, states, ups
from tests.dicom.ups_test_server import UpsServer, workitem
from tests.processes import LIMIT_S

__all__ = ["ups"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]

CONFIG = """
[worklist]
url = "{url}"
station = "CAMSERVE1"
poll_s = 0.1

[[rules]]
model = "tiny"
method = "grad-cam"
metrics = ["insertion"]
outputs = ["sc", "sr"]
check = "insertion>=0"
"""
# Method, part of the target, and state of the workitem before and after the request whose response is lost.
POINTS = {
    "before the claim": ("PUT", "/state", "SCHEDULED", None),
    "after the claim": ("PUT", "/state", None, "IN PROGRESS"),
    "while the input is read": ("GET", "/workitems/", "IN PROGRESS", None),
    "while the second image is retrieved": ("GET", str(image(1).SOPInstanceUID), "IN PROGRESS", None),
    "before the outcome": ("PUT", "/state", "IN PROGRESS", None),
    "after the outcome": ("PUT", "/state", None, "COMPLETED"),
}


def write_config(folder: Path, server: str, pacs: Pacs, ups: UpsServer) -> Path:
    """Write the configuration of a gateway that performs workitems."""
    return gateways.write_config(folder, server, pacs, CONFIG.format(url=ups.url))


def require_exactly_once(running: Spooled, pacs: Pacs, ups: UpsServer, workitems: int, images: int) -> None:
    """Check that each workitem was claimed and completed once, with one Transaction UID, and refers to all results."""
    for uid in ups.items:
        changes = [(state, transaction) for each, state, transaction in ups.changes if each == uid]
        assert [state for state, _ in changes] == ["IN PROGRESS", "COMPLETED"]
        assert len({transaction for _, transaction in changes}) == 1
    assert len(ups.items) == workitems
    assert len(pacs.objects_by_uid) == 2 * images
    assert set().union(*(outputs(each.dataset) for each in ups.items.values())) == pacs.objects_by_uid.keys()
    assert running.events().count("workitem completed") == workitems
    assert running.dead() == []


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_a_request_to_the_worklist(
    tmp_path: Path, tiny: Server, pacs: Pacs, ups: UpsServer, point: str
) -> None:
    method, part, state_before, state_after = POINTS[point]
    uid = ups.add(workitem(), image(0), image(1))
    reached, killed = threading.Event(), threading.Event()

    def stop_at(method_now: str, target: str, state: str | None) -> bool:
        if killed.is_set() or (method_now, ups.state(uid)) != (method, state) or part not in target:
            return False
        reached.set()
        killed.wait(LIMIT_S)
        return True

    ups.before = lambda method, target: 503 if stop_at(method, target, state_before) else None
    ups.loses = lambda method, target: stop_at(method, target, state_after)
    path, spool = write_config(tmp_path, tiny.address, pacs, ups), tmp_path / "spool"
    with forked(path, spool) as running:
        assert reached.wait(LIMIT_S)
        running.kill()
        running.wait()
        killed.set()
    with forked(path, spool) as running:
        wait_until(lambda: is_over(running, ups))
    require_exactly_once(running, pacs, ups, 1, 2)


def test_kill_before_storage(tmp_path: Path, tiny: Server, pacs: Pacs, ups: UpsServer) -> None:
    pacs.down()
    ups.add(workitem(), image(0), image(1))
    path, spool = write_config(tmp_path, tiny.address, pacs, ups), tmp_path / "spool"
    with forked(path, spool) as running:
        wait_until(lambda: len(running.entries("outbox")) == 2)
        running.kill()
        running.wait()
    assert states(ups) == ["IN PROGRESS"]
    pacs.up()
    with forked(path, spool) as running:
        wait_until(lambda: is_over(running, ups))
    require_exactly_once(running, pacs, ups, 1, 2)
    assert running.events().count("explained") == 2


def test_random_kills(tmp_path: Path, tiny: Server, pacs: Pacs, ups: UpsServer) -> None:
    for number in range(4):
        ups.add(workitem(number), image(2 * number), image(2 * number + 1))
    path, spool = write_config(tmp_path, tiny.address, pacs, ups), tmp_path / "spool"
    chance = random.Random(19)
    for _ in range(6):
        with forked(path, spool) as running:
            time.sleep(chance.uniform(0.05, 1.0))
            running.kill()
            running.wait()
    with forked(path, spool) as running:
        wait_until(lambda: is_over(running, ups))
    require_exactly_once(running, pacs, ups, 4, 8)
