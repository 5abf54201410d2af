"""Successful calls of a real server through the client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import PIL.Image
import pytest
import skimage.data
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import camserve
import camserve.aio
from camserve_server.models.load import state_digest
from camserve_server.models.pixels import Preprocessing
from camserve_server.service.listeners import SERVICE
from camserve_server.service.server import Server

TIMEOUT_S = 240.0
CAT = skimage.data.chelsea()
LITE0 = Preprocessing((96, 96), (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")


@pytest.fixture
def client(server: Server) -> Iterator[camserve.Client]:
    with camserve.Client(server.address, timeout=TIMEOUT_S) as client:
        yield client


def test_explanation_has_map_predictions_scores_and_cost(client: camserve.Client) -> None:
    e = client.explain(CAT, method="grad-cam", metrics=["insertion", "average-drop"], request_id="mine", raw=True)
    assert e.saliency.shape == (96, 96)
    assert e.saliency.dtype == np.float32
    assert (e.saliency.min(), e.saliency.max()) == (0, 1)
    assert e.raw is not None
    assert e.raw.shape == (3, 3)
    assert e.target == e.predictions[0]
    assert len(e.predictions) == 5
    assert 0 < e.target.probability <= 1
    assert e.target.label
    assert set(e.scores) == {"insertion", "average-drop"}
    assert len(e.curves["insertion"]) == 224
    assert e.cost.rows == 1 + 1 + 224 + 1
    assert e.request_id == "mine"


@pytest.mark.slow
def test_metrics_with_the_same_query_share_its_rows(client: camserve.Client) -> None:
    masked = ["average-drop", "average-increase", "average-gain"]
    *_, progress, e = client.explain_stream(CAT, method="grad-cam", metrics=masked)
    assert isinstance(e, camserve.Explanation)
    assert e.cost.rows == 1 + 1 + 1
    assert isinstance(progress, camserve.Progress)
    assert progress.rows_done == progress.rows_total == 3
    for metric in masked:
        alone = client.explain(CAT, method="grad-cam", metrics=[metric])
        assert alone.scores[metric] == e.scores[metric]


@pytest.mark.slow
def test_streams_contain_the_maps_of_randomised_networks(client: camserve.Client, server: Server) -> None:
    assert server.engine is not None
    model = next(iter(server.models.values()))
    before = state_digest(model.module)
    checks = {name: {"steps": 3} for name in ("randomisation-spearman", "randomisation-hog")}
    *events, e = client.evaluate_stream(CAT, method="grad-cam", metrics=checks)
    steps = [event for event in events if isinstance(event, camserve.Randomised)]
    assert isinstance(e, camserve.Evaluation)
    assert e.cost.rows == 2 + 3 * 2
    assert [(step.order, step.index, step.count) for step in steps] == [("cascading", i, 3) for i in range(3)]
    assert steps[0].layers[0] == "classifier"
    assert steps[-1].layers[-1] == "conv_stem"
    assert all(step.saliency.shape == (96, 96) and step.target == e.target.index for step in steps)
    assert not np.array_equal(steps[0].saliency, steps[1].saliency)
    assert e.curves["randomisation-spearman"] == pytest.approx([step.spearman for step in steps])
    *explain_events, two = client.explain_stream(CAT, method="fake-cam", top_k=2, metrics=checks)
    assert isinstance(two, camserve.Explanation)
    steps = [event for event in explain_events if isinstance(event, camserve.Randomised)]
    assert [(step.target, round(step.hog, 9)) for step in steps] == [
        (each.target.index, 1) for each in two.maps for _ in range(3)
    ]
    assert state_digest(model.module) == before


def test_requested_batch_sizes_are_limited_to_those_of_the_server(client: camserve.Client) -> None:
    """A larger batch would delay all other requests."""
    requested = {"forward": 1024, "gradient": 8, "ascend": 16}
    receipt = client.explain(CAT, method="fake-cam", batch_sizes=requested).receipt
    assert receipt.batch_sizes == {**requested, "forward": 16}


def test_receipt_contains_all_arguments_and_versions(client: camserve.Client, server: Server) -> None:
    assert server.engine is not None
    receipt = client.explain(CAT, method="opti-cam", parameters={"steps": 2}, target=281, seed=7).receipt
    assert receipt.model == "efficientnet-lite0"
    assert receipt.model_digest == server.models["efficientnet-lite0"].digest
    assert receipt.model_digest.startswith("sha256:")
    assert receipt.method == "opti-cam"
    assert receipt.parameters["steps"] == 2
    assert receipt.parameters["rate"] == 0.1, "defaults are included"
    assert receipt.layers == ("bn2",)
    assert receipt.targets == (281,)
    assert receipt.seed == 7
    assert receipt.precision == "fp32"
    assert receipt.batch_sizes["forward"] == 4
    assert receipt.preprocessing.startswith("squash 96x96 bicubic")
    assert {"camserve", "torch", "python"} <= set(receipt.versions)


def test_every_form_of_an_image_gives_the_same_map(client: camserve.Client, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    PIL.Image.fromarray(CAT).save(path)
    forms = [path, path.read_bytes(), PIL.Image.fromarray(CAT), CAT, LITE0(PIL.Image.fromarray(CAT)).numpy()]
    maps = [client.explain(form, method="grad-cam").saliency for form in forms]
    assert all(np.array_equal(maps[0], other) for other in maps[1:])


def test_targets_are_named_by_index_or_label(client: camserve.Client) -> None:
    e = client.explain(CAT, method="grad-cam", target=[281, "Egyptian Cat"])
    assert [m.target.index for m in e.maps] == [281, 285]
    assert not np.array_equal(e.maps[0].saliency, e.maps[1].saliency)
    both = client.explain(CAT, method="grad-cam", target=["Cardigan", "cardigan"])
    assert [m.target.index for m in both.maps] == [264, 474], "upper and lower case distinguish the dog from the jacket"


def test_stream_of_poly_cam_contains_its_levels_and_rising_progress(client: camserve.Client) -> None:
    events = list(client.explain_stream(CAT, model="tiny", method="poly-cam"))
    levels = [e for e in events if isinstance(e, camserve.Level)]
    progress = [e for e in events if isinstance(e, camserve.Progress)]
    assert [(level.index, level.count, level.layer) for level in levels] == [(0, 3, "r3"), (1, 3, "r2"), (2, 3, "r1")]
    assert isinstance(events[-1], camserve.Explanation)
    assert np.array_equal(levels[-1].saliency, events[-1].saliency)
    done = [p.rows_done for p in progress]
    assert done == sorted(done)
    assert progress[-1].rows_done == progress[-1].rows_total == events[-1].cost.rows


@pytest.mark.slow
def test_map_and_method_get_the_same_scores(client: camserve.Client) -> None:
    explained = client.explain(CAT, method="grad-cam", metrics=["insertion", "deletion", "average-gain"])
    by_method = client.evaluate(CAT, method="grad-cam")
    by_map = client.evaluate(CAT, saliency=explained.saliency)
    assert by_method.scores == by_map.scores == explained.scores
    assert by_method.receipt.method == "grad-cam"
    assert by_map.receipt.method == ""
    assert np.array_equal(by_method.saliency, explained.saliency)


def test_constant_map_of_the_caller_is_scored_unchanged(client: camserve.Client) -> None:
    e = client.evaluate(CAT, saliency=np.ones((96, 96), np.float32), metrics=["average-drop", "average-increase"])
    values = {name: float(score) for name, score in e.scores.items()}
    assert values == {"average-drop": 0, "average-increase": 0}, "a mask of ones does not change a bit of the image"
    assert e.warnings[0].startswith("degenerate")


def test_nearly_constant_image_has_a_warning(client: camserve.Client) -> None:
    dark = CAT // 16
    explained = client.explain(dark, method="center-gaussian")
    for e in (explained, client.evaluate(dark, saliency=explained.saliency, metrics=["entropy"])):
        assert e.warnings[0].startswith("nearly constant image: 98% of its pixels are within")
    assert client.explain(CAT, method="center-gaussian").warnings == ()
    tensor = LITE0(dark).numpy()
    assert client.explain(tensor, method="center-gaussian").warnings == (), "the range of a tensor is not known"


def test_lists_describe_models_methods_and_metrics(client: camserve.Client) -> None:
    lite0, tiny = client.models()
    assert (lite0.name, tiny.name) == ("efficientnet-lite0", "tiny")
    assert [layer.name for layer in lite0.layers] == [
        "blocks.1.0.bn1",
        "blocks.2.0.bn1",
        "blocks.3.0.bn1",
        "blocks.5.0.bn1",
        "bn2",
    ]
    assert lite0.classes == len(lite0.labels) == 1000
    methods = {method.name: method for method in client.methods("efficientnet-lite0")}
    assert methods["poly-cam"].rows == 1 + 1 + 2 * (96 + 144 + 240 + 672 + 1280)
    assert methods["poly-cam"].layers == "many"
    assert {"poly-cam", "poly-cam+", "poly-cam-", "opti-cam", "grad-cam", "score-cam"} <= set(methods)
    steps = next(p for p in methods["opti-cam"].parameters if p.name == "steps")
    assert (steps.type, steps.default, steps.minimum) == ("integer", 100, 1)
    metrics = {metric.name: metric for metric in client.metrics()}
    assert set(metrics) >= {"insertion", "deletion", "average-drop", "average-increase", "average-gain"}
    assert not metrics["deletion"].higher_is_better


def test_asyncio_client_gets_equal_maps_from_concurrent_calls(server: Server) -> None:
    async def ask() -> tuple[camserve.Explanation, camserve.Explanation]:
        async with camserve.aio.Client(server.address) as client:
            one, other = await asyncio.gather(
                client.explain(CAT, model="tiny", method="grad-cam"),
                client.explain(CAT, model="tiny", method="grad-cam"),
            )
            events = [event async for event in client.explain_stream(CAT, model="tiny", method="poly-cam+")]
            assert isinstance(events[-1], camserve.Explanation)
            return one, other

    one, other = asyncio.run(ask())
    assert np.array_equal(one.saliency, other.saliency)


def test_health_and_reflection_name_the_service(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        query = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([query]), timeout=TIMEOUT_S)
        assert SERVICE in {service.name for service in answer.list_services_response.service}


def test_signed_layer_causes_a_warning(client: camserve.Client) -> None:
    e = client.explain(CAT, model="tiny", method="poly-cam", layers=["c2", "r3"])
    assert any("c2 has negative activations" in warning for warning in e.warnings)
