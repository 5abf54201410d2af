"""Replays on a real server."""

from __future__ import annotations

import numpy as np
import skimage.data

import camserve
from camserve_server.service.server import Server


def test_replay_uses_the_batch_sizes_of_the_receipt(server: Server) -> None:
    with camserve.Client(server.address) as client:
        cat = skimage.data.chelsea()
        receipt = client.explain(cat, model="tiny").receipt
        smaller = {**receipt.batch_sizes, "forward": 2}
        e = client.explain(cat, model="tiny", batch_sizes=smaller)
        again = client.replay(e.receipt, cat)
    assert e.receipt.batch_sizes == smaller
    assert (again.same, again.differences) == (True, {})


def test_replay_of_a_budgeted_map_stops_at_the_same_row(server: Server) -> None:
    with camserve.Client(server.address) as client:
        cat = skimage.data.chelsea()
        whole = client.explain(cat, model="tiny")
        e = client.explain(cat, model="tiny", metrics=["average-drop"], budget=whole.cost.rows // 2)
        again = client.replay(e.receipt, cat)
    assert whole.share == 1
    assert 0 < e.share < 1
    assert e.cost.rows <= whole.cost.rows // 2
    assert (again.same, again.explanation.share) == (True, e.share)


def test_replay_of_an_evaluation_gives_the_same_map(server: Server) -> None:
    with camserve.Client(server.address) as client:
        cat = skimage.data.chelsea()
        evaluation = client.evaluate(cat, model="tiny", method="opti-cam", parameters={"steps": 2}, target=3, seed=4)
        again = client.replay(evaluation.receipt, cat)
    assert (again.same, again.differences) == (True, {})
    assert np.array_equal(again.explanation.saliency, evaluation.saliency)
