"""Fuzz tests of the Open Inference Protocol: each request is converted and planned, or gives an error with a field."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from camserve_server.errors import CamserveError, InvalidArgument, NotFound
from camserve_server.open_inference import inference_pb2 as pb
from camserve_server.service import requests
from camserve_server.service.inference.requests import OUTPUTS, explain_request
from tests.fuzz.sample_images import VALID
from tests.fuzz.test_requests import CONFIG, FUZZ, INT64, MODEL, NUMBER, PARAMETERS, TEXT, few

NAMES = ["method", "layers", "seed", "targets", "target_top_k", "metrics", "budget", "precision", "priority"]
LISTS = st.sampled_from(["grad-cam", "rise", "1,2", "c2, r3", "insertion", "0", "9" * 5_000, "²", ",", ""])
TYPED = st.builds(
    pb.InferTensorContents,
    uint_contents=few(st.integers(0, 2**32 - 1), 6),
    fp32_contents=few(st.floats(width=32), 6),
    bytes_contents=few(st.sampled_from(sorted(VALID.values())) | st.binary(max_size=20), 2),
)
PARAMETER = st.one_of(
    st.builds(pb.InferParameter, bool_param=st.booleans()),
    st.builds(pb.InferParameter, int64_param=INT64 | st.integers(0, 5)),
    st.builds(pb.InferParameter, uint64_param=st.integers(0, 2**64 - 1)),
    st.builds(pb.InferParameter, double_param=NUMBER),
    st.builds(pb.InferParameter, string_param=LISTS | TEXT),
    st.just(pb.InferParameter()),
)
SHAPE = st.sampled_from([(1, 1, 2, 3), (1, 2, 3), (1, 3, 32, 32), (3, 32, 32), (1,), (1, 1)]) | few(INT64, 5)
INPUT = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.just("image") | TEXT,
    datatype=st.sampled_from(["UINT8", "FP32", "BYTES", "FP16"]),
    shape=SHAPE,
    parameters=st.just({}) | st.dictionaries(TEXT, PARAMETER, max_size=1),
    contents=st.none() | TYPED,
)
RAW = st.sampled_from([bytes(6), bytes(4 * 3 * 32 * 32), b"\x00\x00\x00\x00"]) | st.binary(max_size=20)


PARAMETERS_OF_REQUESTS = st.dictionaries(
    st.sampled_from(NAMES)
    | st.sampled_from(["method.", *PARAMETERS, *(f"method.{each}" for each in PARAMETERS)])
    | TEXT,
    PARAMETER,
    max_size=3,
)
IMAGE = pb.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1, 2, 3])


def check(message: pb.ModelInferRequest) -> None:
    """Assert that a request is converted and planned, or refused with the name of a field."""
    try:
        requests.parse_explain(explain_request(message), MODEL, CONFIG)
    except (InvalidArgument, NotFound) as error:
        assert error.field
    except CamserveError:
        pass


@FUZZ
@given(PARAMETERS_OF_REQUESTS)
@example({"targets": pb.InferParameter(string_param="9" * 5_000)})
def test_parameters_are_converted_or_name_the_wrong_field(parameters: dict[str, pb.InferParameter]) -> None:
    check(pb.ModelInferRequest(parameters=parameters, inputs=[IMAGE], raw_input_contents=[bytes(18)]))


@FUZZ
@given(
    st.builds(
        pb.ModelInferRequest,
        model_version=st.sampled_from(["", "1"]) | TEXT,
        inputs=st.lists(INPUT, min_size=1, max_size=1) | few(INPUT, 2),
        outputs=few(
            st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=st.sampled_from(OUTPUTS) | TEXT), 2
        ),
        raw_input_contents=st.lists(RAW, max_size=2),
    )
)
def test_images_and_outputs_are_converted_or_name_the_wrong_field(message: Any) -> None:
    check(message)
