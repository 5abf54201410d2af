"""Fuzz tests of requests: each can be planned, or gives an error with the invalid field."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import pytest
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import Config
from camserve_server.errors import CamserveError, InvalidArgument, TooLarge
from camserve_server.registry import METHODS, METRICS
from camserve_server.request_plan import limits
from camserve_server.service import bounds, requests
from tests import nets
from tests.fuzz.sample_images import VALID
from tests.support import as_model

MODEL = as_model(nets.tiny_cnn(), (32, 32))
CONFIG = Config(max_image_pixels=1_000_000)
FUZZ = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

PARAMETERS = sorted({p.name for entry in (*METHODS.values(), *METRICS.values()) for p in entry.parameters})
INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
# Surrogates are not valid UTF-8, so that protobuf refuses them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats() | st.sampled_from([0.0, 1.0, -1.0, 3.0, 1e300, 2.0**63])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def structs(draw: st.DrawFn) -> Struct:
    struct = Struct()
    struct.update(draw(st.dictionaries(st.sampled_from(PARAMETERS) | TEXT, VALUES, max_size=4)))
    return struct


@st.composite
def tensors(draw: st.DrawFn) -> pb.Tensor:
    """Return tensors of valid shapes, and tensors with a wrong shape, wrong length, NaN or infinity."""
    shape = draw(
        st.sampled_from([(3, 32, 32), (32, 32), (1, 1), (4, 9)])
        | st.lists(st.sampled_from([0, 1, -1, 2, 32, 2**16, 2**31 - 1, -(2**31)]), max_size=80)
    )
    size = 4
    for side in shape:
        size = min(abs(size * side), 4 * 3 * 32 * 32)
    value = draw(st.sampled_from([b"\x00\x00\x00\x00", b"\x00\x00\x80\x3f", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"]))
    data = value * (size // 4) if draw(st.booleans()) else draw(st.binary(max_size=64))
    return pb.Tensor(shape=shape, data=data, dtype=draw(st.just("") | st.sampled_from(["float32", "uint8"]) | TEXT))


def images() -> st.SearchStrategy[pb.Image]:
    pixels = st.builds(pb.Pixels, height=INT32 | st.just(2), width=INT32 | st.just(2), data=st.binary(max_size=24))
    return st.one_of(
        st.builds(pb.Image, encoded=st.sampled_from(sorted(VALID.values())) | st.binary(max_size=50)),
        st.builds(pb.Image, pixels=pixels),
        st.builds(pb.Image, tensor=tensors()),
        st.just(pb.Image()),
    )


def few(each: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(each, max_size=most)


METHOD = st.builds(
    pb.MethodSpec,
    name=st.sampled_from(sorted(METHODS)) | TEXT,
    parameters=structs(),
    layers=few(st.sampled_from(["r1", "r2", "r3", "r1#2"]) | TEXT),
    seed=st.integers(0, 2**64 - 1),
)
METRIC = st.builds(pb.MetricSpec, name=st.sampled_from(sorted(METRICS)) | TEXT, parameters=structs())
TARGET = st.builds(pb.Target, index=INT32 | st.integers(0, 6)) | st.builds(pb.Target, label=TEXT) | st.just(pb.Target())
SIDE = st.floats(0, 1) | st.floats()
BOX = st.builds(pb.Box, left=SIDE, top=SIDE, right=SIDE, bottom=SIDE)
TRUTH = st.builds(pb.Truth, boxes=few(BOX), mask=st.none() | tensors())
SHARED: dict[str, Any] = {
    "request_id": TEXT,
    "image": st.just(pb.Image(encoded=VALID["png"])) | images(),
    "metrics": few(METRIC),
    "budget": st.just(0) | INT64,
    "batch_sizes": st.dictionaries(st.sampled_from(["forward", "gradient", "ascend"]) | TEXT, INT32, max_size=2),
    "truth": st.none() | TRUTH,
    "precision": st.just("") | st.just("fp64") | TEXT,
    "map_format": st.none()
    | st.builds(pb.MapFormat, dtype=st.sampled_from(["", "uint8"]) | TEXT, native=st.booleans()),
}
EXPLAIN = st.builds(
    pb.ExplainRequest,
    method=METHOD,
    targets=few(TARGET),
    top_k=st.just(0) | INT32,
    raw=st.booleans(),
    target_top_k=st.just(0) | INT32,
    **SHARED,
)
SUBJECTS: list[dict[str, Any]] = [{"method": METHOD}, {"saliency": tensors()}, {}]
EVALUATE = st.one_of(
    [
        st.builds(pb.EvaluateRequest, target=st.none() | TARGET, seed=st.integers(0, 2**64 - 1), **subject, **SHARED)
        for subject in SUBJECTS
    ]
)


def check(request: Message) -> None:
    """Parse the request as the service does. Exceptions other than those of camserve are not caught."""
    try:
        if isinstance(request, pb.ExplainRequest):
            parsed = requests.parse_explain(request, MODEL, CONFIG)
        else:
            assert isinstance(request, pb.EvaluateRequest)
            parsed = requests.parse_evaluate(request, MODEL, CONFIG)
        assert 1 <= parsed.rows.least <= parsed.rows.most
        limits(parsed.model, parsed.method, parsed.rows, budget=parsed.budget)
        requests.decode_pixels(parsed, CONFIG)
    except CamserveError as error:
        assert error.field
        assert len(error.message.encode()) <= 1000


@pytest.mark.slow
@settings(FUZZ, max_examples=500)
@given(EXPLAIN)
def test_explain_requests_are_parsed_or_refused(request: pb.ExplainRequest) -> None:
    check(request)


@pytest.mark.slow
@settings(FUZZ, max_examples=300)
@given(EVALUATE)
def test_evaluate_requests_are_parsed_or_refused(request: pb.EvaluateRequest) -> None:
    check(request)


@pytest.mark.slow
@settings(FUZZ, max_examples=300)
@given(EXPLAIN | EVALUATE, st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4)), max_size=5), st.booleans())
def test_corrupted_messages_are_parsed_or_refused(
    request: Message, changes: list[tuple[int, bytes]], cut: bool
) -> None:
    data = bytearray(request.SerializeToString())
    for at, value in changes:
        data[at % (len(data) + 1) : at % (len(data) + 1) + len(value)] = value
    data = data[: len(data) // 2] if cut else data
    try:
        parsed = bounds.parse(type(request), bytes(data))
    except InvalidArgument as error:
        assert "cannot be read" in error.message
    except TooLarge:  # a length has become large
        pass
    else:
        check(parsed)


# ---- huge messages ---------------------------------------------------------------------------------------------------


def ld(number: int, data: bytes) -> bytes:
    """Encode a length-delimited field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


# Each message is built when its test runs, because that takes a moment.
HUGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a struct of a million keys": (lambda: ld(4, ld(2, million(lambda name: ld(1, ld(1, name))))), "method"),
    "a list of millions": (lambda: ld(4, ld(2, ld(1, ld(2, ld(6, ld(1, b"") * 5_000_000))))), "method"),
    "a million layers": (lambda: ld(4, ld(3, b"") * 1_000_000), "method"),
    "millions of targets": (lambda: ld(5, b"") * 5_000_000, "targets"),
    "millions of metrics": (lambda: ld(6, b"") * 5_000_000, "metrics"),
    "millions of boxes": (lambda: ld(12, ld(1, b"") * 5_000_000), "truth.boxes"),
    "millions of sides": (lambda: ld(3, ld(3, ld(1, b"\x01" * 20_000_000))), "image.tensor.shape"),
    "a million lanes": (lambda: million(lambda name: ld(11, ld(1, name))), "batch_sizes"),
    "millions of images": (lambda: ld(3, ld(1, b"")) * 3_000_000, "image.encoded"),
    "a long name": (lambda: ld(2, b"a" * 1_000_000), "model"),
    "an unknown field": (lambda: b"\xa0\x06\x01" * 5_000_000, ""),
}


def million(encode: Callable[[bytes], bytes]) -> bytes:
    """Join a million encoded names. They differ only in their last seven bytes, so one of them is encoded."""
    head = encode(b"0000000")[:-7]
    return b"".join(head + b"%07x" % i for i in range(1_000_000))


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_huge_messages_are_refused_without_parsing(name: str) -> None:
    """Parsing takes seconds, in which the event loop is blocked, and up to a gigabyte."""
    build, field = HUGE[name]
    data = build()
    limit_s = 10 * _seconds_of_a_loop()
    started = time.thread_time()
    with pytest.raises(TooLarge) as caught:
        bounds.parse(unparsed(pb.ExplainRequest), data)
    assert time.thread_time() - started < limit_s
    assert caught.value.field == field
    with pytest.raises(TooLarge) as caught:
        bounds.parse(unparsed(pb.ExplainStreamRequest), ld(1, data))
    assert caught.value.field == field


def unparsed(kind: type[Message]) -> type[Message]:
    """Return a stand-in for a class of messages that fails when it parses."""

    class Unparsed:
        DESCRIPTOR = kind.DESCRIPTOR

        @staticmethod
        def FromString(data: bytes) -> Message:
            raise AssertionError("the message was parsed")

    return cast("type[Message]", Unparsed)


@cache
def _seconds_of_a_loop() -> float:
    """Return the CPU seconds for a million steps of Python, as a unit that depends on the machine."""
    started = time.thread_time()
    for _ in range(1_000_000):
        pass
    return max(time.thread_time() - started, 0.02)


@pytest.mark.slow
def test_images_maps_and_masks_do_not_count_as_other_bytes() -> None:
    large = bytes(50 << 20)
    mask = pb.Truth(mask=pb.Tensor(shape=[1, 1], data=large))
    for image in (
        pb.Image(encoded=large),
        pb.Image(pixels=pb.Pixels(height=1, width=1, data=large)),
        pb.Image(tensor=pb.Tensor(shape=[1], data=large)),
    ):
        request = pb.ExplainRequest(image=image, truth=mask)
        assert bounds.parse(pb.ExplainRequest, request.SerializeToString()) == request
    scored = pb.EvaluateRequest(saliency=pb.Tensor(shape=[1], data=large), truth=mask)
    assert bounds.parse(pb.EvaluateRequest, scored.SerializeToString()) == scored


def test_largest_valid_request_is_parsed() -> None:
    """The request repeats each field as often as allowed, with names of a hundred characters."""
    name = "a" * 100
    request = pb.ExplainRequest(
        request_id=name,
        model=name,
        image=pb.Image(encoded=VALID["png"]),
        method=pb.MethodSpec(name=name, layers=[name] * requests.MAX_LAYERS),
        targets=[pb.Target(label=name)] * requests.MAX_TARGETS,
        metrics=[pb.MetricSpec(name=name)] * requests.MAX_METRICS,
        batch_sizes={name: 1},
        truth=pb.Truth(boxes=[pb.Box(left=0.1, top=0.1, right=0.9, bottom=0.9)] * requests.MAX_BOXES),
    )
    for spec in request.metrics:
        spec.parameters.update({f"{name}{i}": 0.5 for i in range(3)})
    assert bounds.parse(pb.ExplainRequest, request.SerializeToString()) == request


@pytest.mark.parametrize("depth", [10, 1_000])
def test_deeply_nested_struct_is_refused(depth: int) -> None:
    """protobuf parses at most a hundred nested messages."""
    value = ld(3, b"deep")
    for _ in range(depth):
        value = ld(6, ld(1, value))
    data = ld(4, ld(1, b"opti-cam") + ld(2, ld(1, ld(1, b"steps") + ld(2, value))))
    try:
        parsed = bounds.parse(pb.ExplainRequest, data)
    except InvalidArgument as error:
        assert depth == 1_000
        assert "nested too deeply" in error.message
    else:
        assert depth == 10
        assert isinstance(parsed, pb.ExplainRequest)
        parsed.image.CopyFrom(pb.Image(encoded=VALID["png"]))
        with pytest.raises(InvalidArgument, match="expected a value of type integer") as caught:
            requests.parse_explain(parsed, MODEL, CONFIG)
        assert caught.value.field == "method.parameters.steps"
