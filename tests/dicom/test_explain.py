"""Explanations of DICOM images over a real channel: the request has no value of the header."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pydicom
import pytest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from pydicom import Dataset
from typer.testing import CliRunner

import camserve
import camserve_dicom as dicom
from camserve.connection import SERVICE
from camserve.errors import InvalidArgument
from camserve.images import MAX_MESSAGE_BYTES
from camserve.v1 import explain_pb2 as pb
from camserve_cli.app import app
from camserve_dicom import explaining
from camserve_server.service.server import Server
from tests.client.fake_server import Servicer
from tests.dicom.samples import INSTANCE, SECRETS, SERIES, STUDY, data_of, image, ramp
from tests.dicom.test_pdf import LAST_RESORT, pages
from tests.processes import CAMSERVE, LIMIT_S, completed

UIDS = [INSTANCE, SERIES, STUDY, "1.2.826.0.1.3680043.8.498.7004"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"{SECRETS['PatientID']}.dcm"
    path.write_bytes(data_of(image(ramp(), SpecificCharacterSet="ISO_IR 100")))
    return path


def header_texts(dataset: Dataset) -> set[str]:
    """Return all texts of the header that are too long to occur by chance."""
    values = {str(part) for each in dataset.iterall() if each.VR != "SQ" for part in str(each.value).split("\\")}
    values |= {part for value in values for part in re.split(r"[\^=, ]", value)}
    return {value for value in values if len(value) >= 4 and not re.fullmatch(r"[\d.+\-\[\]]{0,5}", value)}


# ---- the wire -------------------------------------------------------------------------------------------------------


class RecordingHandler(grpc.GenericRpcHandler):
    """Record the bytes and the metadata of each Explain request, and refuse it."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, str]] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if not details.method.endswith("/Explain"):
            return None

        def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls.append((request, f"{details.method} {details.invocation_metadata}"))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "refused")
            raise AssertionError

        return grpc.unary_unary_rpc_method_handler(refuse)


def test_request_has_only_pixels_and_an_id(file: Path) -> None:
    recorder = RecordingHandler()
    server = grpc.server(
        ThreadPoolExecutor(2), handlers=[recorder], options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    )
    health = HealthServicer()
    health.set(SERVICE, HealthCheckResponse.SERVING)
    add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with camserve.Client(f"127.0.0.1:{port}", timeout=20) as client:  # longer calls use the stream
            for _ in range(2):
                with pytest.raises(camserve.CamserveError, match="refused"):
                    dicom.explain(client, file, method="grad-cam", target=3)
    finally:
        server.stop(None).wait()
    assert len(recorder.calls) == 2
    source = pydicom.dcmread(file)
    secrets = header_texts(source)
    assert {*SECRETS.values(), *UIDS, "Wintersohn"} <= secrets
    ids = set()
    for data, metadata in recorder.calls:
        request = pb.ExplainRequest.FromString(data)
        ids.add(request.request_id)
        grey = dicom.read(file).pixels
        assert request.image.pixels.data == np.repeat(grey[..., None], 3, axis=2).tobytes()
        assert request.image.ByteSize() <= 3 * grey.size + 20
        request.ClearField("image")
        request.request_id = ""
        rest = pb.ExplainRequest(method=pb.MethodSpec(name="grad-cam"), targets=[pb.Target(index=3)], top_k=5)
        rest.metrics.extend(pb.MetricSpec(name=name) for name in ("insertion", "deletion", "average-gain"))
        request.method.ClearField("parameters")
        for metric in request.metrics:
            metric.ClearField("parameters")
        assert request == rest
        for encoding in ("utf-8", "latin-1", "utf-16-le"):
            leaked = [each for each in secrets if each.encode(encoding, "replace") in data]
            assert leaked == []
        assert [each for each in secrets if each in metadata] == []
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
    assert len(ids) == 2


def test_very_large_image_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 3 * explaining.MAX_PIXELS < MAX_MESSAGE_BYTES, "an image of the maximum size fits into a message"
    monkeypatch.setattr(explaining, "MAX_PIXELS", 200_000)
    rendered = dicom.read(image(np.tile(np.arange(500, dtype=np.uint16), (450, 1))))
    small = dicom.request_pixels(rendered)
    assert small.shape == (225, 250)
    np.testing.assert_allclose(small[0], rendered.pixels[0].reshape(-1, 2).mean(1), atol=1)
    assert dicom.request_pixels(dicom.read(image(ramp()))).shape == ramp().shape


# ---- the clients ----------------------------------------------------------------------------------------------------


def test_explain_makes_objects(client: camserve.Client, servicer: Servicer, file: Path, tmp_path: Path) -> None:
    made = dicom.explain(client, file, outputs=("sr", "sc", "pm"), check=None, metrics={"insertion": {"steps": 5}})
    assert list(made.objects) == ["sc", "sr", "pm"]
    assert made.explanation.target.probability == 0.75
    assert made.withheld == ""
    assert servicer.requests[-1].metrics[0].parameters["steps"] == 5
    paths = made.save(tmp_path / "out", "case")
    assert [path.name for path in paths] == ["case.sc.dcm", "case.sr.dcm", "case.pm.dcm"]
    for path, each in zip(paths, made.objects.values(), strict=True):
        assert path.read_bytes() == data_of(each)
    again = dicom.explain(client, file, outputs=("sc",), check=None, metrics={"insertion": {"steps": 5}})
    assert again.explanation.request_id != made.explanation.request_id
    assert data_of(again.objects["sc"]) == data_of(made.objects["sc"])
    assert again.save(tmp_path / "named")[0].name == f"{again.objects['sc'].SOPInstanceUID}.sc.dcm"
    other = dicom.explain(client, file, outputs=("sc",), check=None, metrics={"insertion": {"steps": 6}})
    assert other.objects["sc"].SOPInstanceUID != made.objects["sc"].SOPInstanceUID


def test_explain_async_makes_the_same_objects(client: camserve.Client, address: str, file: Path) -> None:
    async def explain_with_aio() -> dicom.DicomExplanation:
        async with camserve.aio.Client(address, timeout=LIMIT_S) as client:
            return await dicom.explain_async(client, file, check=None)

    made = asyncio.run(explain_with_aio())
    blocking = dicom.explain(client, file, check=None)
    assert {k: data_of(v) for k, v in made.objects.items()} == {k: data_of(v) for k, v in blocking.objects.items()}


def test_invalid_arguments_are_refused_before_sending(client: camserve.Client, servicer: Servicer, file: Path) -> None:
    with pytest.raises(InvalidArgument, match="needs the metric deletion") as wrong:
        dicom.explain(client, file, metrics=["insertion"])
    assert wrong.value.field == "check"
    with pytest.raises(dicom.DicomError, match="frame is 1; expected 0 to 0"):
        dicom.explain(client, file, frame=1)
    with pytest.raises(InvalidArgument, match="outputs"):
        dicom.explain(client, file, outputs=["jpeg"])
    assert servicer.requests == []


@pytest.mark.slow
def test_real_server_gives_the_same_objects_twice(tiny: Server, file: Path) -> None:
    with camserve.Client(tiny.address, timeout=LIMIT_S) as client:
        first, second = (
            dicom.explain(client, file, method="grad-cam", outputs=dicom.KINDS, check="insertion>=0") for _ in range(2)
        )
        [equipment] = first.objects["sc"].ContributingEquipmentSequence
        receipt = camserve.Receipt.from_json(equipment.private_block(0x0099, "camserve")[0x01].value)
        assert client.replay(receipt, dicom.request_pixels(dicom.read(file))).same
    assert list(first.objects) == list(dicom.KINDS)
    for kind in dicom.KINDS:
        assert data_of(first.objects[kind]) == data_of(second.objects[kind])
    assert set(first.explanation.scores) == {"insertion", "deletion", "average-gain"}


# ---- the command line -----------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    """Run `camserve dicom explain` in this process."""
    return CliRunner().invoke(app, ["dicom", "explain", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_command_writes_objects(address: str, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "more" / file.name
    other.parent.mkdir()
    other.write_bytes(data_of(image(ramp(), SOPInstanceUID=INSTANCE + ".1")))
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"not DICOM" * 100)
    out = tmp_path / "out"
    arguments = (file, photo, other, "--address", address, "--out", out, "--check", "none", "--outputs", "sc,gsps")
    ran = run(*arguments)
    assert ran.exit_code == 1
    assert f"error: {photo}: the file is not DICOM" in ran.stderr
    stem = file.stem
    names = [f"{stem}-2.gsps.dcm", f"{stem}-2.sc.dcm", f"{stem}.gsps.dcm", f"{stem}.sc.dcm"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert pydicom.dcmread(out / f"{stem}.sc.dcm").StudyInstanceUID == STUDY
    lines = [json.loads(line) for line in run(*arguments, "--json").stdout.splitlines()]
    assert [each["file"] for each in lines] == [str(file), str(other)]
    assert lines[0]["target"]["index"] == 281
    assert lines[0]["objects"] == [str(out / f"{stem}.{kind}.dcm") for kind in ("sc", "gsps")]


def test_command_does_not_replace_its_input(address: str, file: Path, tmp_path: Path) -> None:
    result = tmp_path / f"{file.stem}.sc.dcm"
    result.write_bytes(data_of(image(ramp())))
    before = result.read_bytes()
    ran = run(file, result, "--address", address, "--out", tmp_path, "--check", "none", "--outputs", "sc")
    assert ran.exit_code == 0, ran.stderr
    assert result.read_bytes() == before
    assert (tmp_path / f"{file.stem}-2.sc.dcm").exists()


def test_command_reports_a_withheld_overlay(address: str, file: Path, tmp_path: Path) -> None:
    # The fake server returns the same value for insertion and deletion.
    ran = run(file, "--address", address, "--out", tmp_path / "out")
    assert ran.exit_code == 0
    assert "check insertion > deletion failed" in ran.stderr
    assert [path.suffixes for path in (tmp_path / "out").iterdir()] == [[".sr", ".dcm"]]


def test_command_writes_a_pdf_with_another_font(address: str, tmp_path: Path) -> None:
    file, out = tmp_path / "image.dcm", tmp_path / "out"
    file.write_bytes(data_of(image(ramp(), SpecificCharacterSet="ISO_IR 192", PatientName="山田^太郎")))
    ran = run(
        file, "--address", address, "--out", out, "--check", "none", "--outputs", "pdf", "--pdf-font", LAST_RESORT
    )
    assert ran.exit_code == 0, ran.stderr
    assert "山田 太郎, ID" in pages(pydicom.dcmread(out / "image.pdf.dcm"))[0]
    ran = run(file, "--address", address, "--out", out, "--outputs", "pdf", "--pdf-font", tmp_path / "none.ttf")
    assert ran.exit_code == 1
    assert "none.ttf cannot be read; expected a TrueType or OpenType file" in ran.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--window", "40"), ("--regions", "keep"), ("--outputs", "jpeg"), ("--check", "insertion")]
)
def test_invalid_options(address: str, file: Path, tmp_path: Path, option: str, value: str) -> None:
    ran = run(file, "--address", address, "--out", tmp_path / "out", option, value)
    assert ran.exit_code in (1, 2)
    assert option.lstrip("-") in ran.stderr


@pytest.mark.slow
def test_command_prints_no_header_values(address: str, tmp_path: Path) -> None:
    """pydicom quotes values that violate the standard in warnings."""
    odd = image(ramp(), PatientWeight="63.25", PatientSize="1.7125")
    data = data_of(odd).replace(b"20240229", b"2024-02-").replace(b"19520317", b"1952X317")
    data = data.replace(b"63.25", b"63,25").replace(b"1.7125", b"1.712m")
    data = data.replace(UIDS[-1].encode(), UIDS[-1][:-1].encode() + b"X")
    path = tmp_path / "case.dcm"
    path.write_bytes(data)
    arguments = ["--out", tmp_path / "out", "--outputs", "sc,sr,pm,seg,gsps", "--check", "none", "--json"]
    ran = completed([*CAMSERVE, "dicom", "explain", path, "--address", address, *map(str, arguments)])
    assert ran.returncode == 0, ran.stderr
    output = ran.stdout + ran.stderr
    assert len(list((tmp_path / "out").iterdir())) == 5
    secrets = {
        *SECRETS.values(),
        *UIDS,
        "2024-02-",
        "1952X317",
        "63,25",
        "1.712m",
        UIDS[-1][:-1] + "X",
        "Wintersohn",
        "Amelie",
    }
    assert [each for each in secrets if each in output] == []


def test_log_has_no_header_values(client: camserve.Client, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        dicom.explain(client, file, check=None)
    assert [each for each in [*SECRETS.values(), *UIDS] if each in caplog.text] == []
