"""From a DICOM image to its objects, over a real channel: nothing of the header goes along."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
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
from camserve_server.service.server import Server
from tests.dicom.samples import INSTANCE, SECRETS, SERIES, STUDY, data_of, image, ramp

UIDS = [INSTANCE, SERIES, STUDY, "1.2.826.0.1.3680043.8.498.7004"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"{SECRETS['PatientID']}.dcm"
    path.write_bytes(data_of(image(ramp(), SpecificCharacterSet="ISO_IR 100")))
    return path


def strings(dataset: Dataset) -> set[str]:
    """Every text of the header that is long enough to be told from chance."""
    values = {str(part) for each in dataset.iterall() if each.VR != "SQ" for part in str(each.value).split("\\")}
    values |= {part for value in values for part in re.split(r"[\^=, ]", value)}
    return {value for value in values if len(value) >= 4 and not re.fullmatch(r"[\d.+\-\[\]]{0,5}", value)}


# ---- the wire -------------------------------------------------------------------------------------------------------


class Tapped(grpc.GenericRpcHandler):
    """Keeps each request as the bytes and the metadata that came, and answers none."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, str]] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if not details.method.endswith("/Explain"):
            return None

        def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls.append((request, f"{details.method} {details.invocation_metadata}"))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "seen")
            raise AssertionError

        return grpc.unary_unary_rpc_method_handler(refuse)


def test_pixels_and_a_request_id_are_all_that_is_sent(file):
    tapped = Tapped()
    server = grpc.server(
        ThreadPoolExecutor(2), handlers=[tapped], options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    )
    health = HealthServicer()
    health.set(SERVICE, HealthCheckResponse.SERVING)
    add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with camserve.Client(f"127.0.0.1:{port}", timeout=20) as client:
            for _ in range(2):
                with pytest.raises(camserve.CamserveError, match="seen"):
                    dicom.explain(client, file, method="grad-cam", target=3)
    finally:
        server.stop(None).wait()
    assert len(tapped.calls) == 2
    source = pydicom.dcmread(file)
    secrets = strings(source)
    assert {*SECRETS.values(), *UIDS, "Wintersohn"} <= secrets
    ids = set()
    for sent, about in tapped.calls:
        request = pb.ExplainRequest.FromString(sent)
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
            found = [each for each in secrets if each.encode(encoding, "replace") in sent]
            assert found == []
        assert [each for each in secrets if each in about] == []
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
    assert len(ids) == 2


def test_a_very_large_image_is_made_smaller_to_be_sent():
    rendered = dicom.read(image(np.tile(np.arange(5000, dtype=np.uint16), (4500, 1))))
    small = dicom.request_pixels(rendered)
    assert small.shape == (2250, 2500)
    np.testing.assert_allclose(small[0], rendered.pixels[0].reshape(-1, 2).mean(1), atol=1)
    assert dicom.request_pixels(dicom.read(image(ramp()))).shape == ramp().shape


# ---- the clients ----------------------------------------------------------------------------------------------------


def test_an_explanation_with_its_objects(client, servicer, file, tmp_path):
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


def test_the_awaited_client_does_the_same(client, address, file):
    async def awaited() -> dicom.DicomExplanation:
        async with camserve.aio.Client(address, timeout=20) as client:
            return await dicom.explain_async(client, file, check=None)

    made = asyncio.run(awaited())
    blocking = dicom.explain(client, file, check=None)
    assert {k: data_of(v) for k, v in made.objects.items()} == {k: data_of(v) for k, v in blocking.objects.items()}


def test_what_is_wrong_is_said_before_anything_is_sent(client, servicer, file):
    with pytest.raises(InvalidArgument, match="needs the metric deletion") as wrong:
        dicom.explain(client, file, metrics=["insertion"])
    assert wrong.value.field == "check"
    with pytest.raises(dicom.DicomError, match="frame is 1; expected 0 to 0"):
        dicom.explain(client, file, frame=1)
    with pytest.raises(InvalidArgument, match="outputs"):
        dicom.explain(client, file, outputs=["pdf"])
    assert servicer.requests == []


def test_a_real_server_explains_twice_alike(tiny: Server, file):
    with camserve.Client(tiny.address, timeout=60) as client:
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
    return CliRunner().invoke(app, ["dicom", "explain", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_writes_objects(address, file, tmp_path):
    other = tmp_path / "more" / file.name
    other.parent.mkdir()
    other.write_bytes(data_of(image(ramp(), SOPInstanceUID=INSTANCE + ".1")))
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"no DICOM" * 100)
    out = tmp_path / "out"
    given = (file, photo, other, "--address", address, "--out", out, "--check", "none", "--outputs", "sc,gsps")
    ran = run(*given)
    assert ran.exit_code == 1
    assert f"error: {photo}: the file is not DICOM" in ran.stderr
    stem = file.stem
    names = [f"{stem}-2.gsps.dcm", f"{stem}-2.sc.dcm", f"{stem}.gsps.dcm", f"{stem}.sc.dcm"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert pydicom.dcmread(out / f"{stem}.sc.dcm").StudyInstanceUID == STUDY
    lines = [json.loads(line) for line in run(*given, "--json").stdout.splitlines()]
    assert [each["file"] for each in lines] == [str(file), str(other)]
    assert lines[0]["target"]["index"] == 281
    assert lines[0]["objects"] == [str(out / f"{stem}.{kind}.dcm") for kind in ("sc", "gsps")]


def test_no_object_replaces_what_is_explained(address, file, tmp_path):
    result = tmp_path / f"{file.stem}.sc.dcm"
    result.write_bytes(data_of(image(ramp())))
    before = result.read_bytes()
    ran = run(file, result, "--address", address, "--out", tmp_path, "--check", "none", "--outputs", "sc")
    assert ran.exit_code == 0, ran.stderr
    assert result.read_bytes() == before
    assert (tmp_path / f"{file.stem}-2.sc.dcm").exists()


def test_a_withheld_overlay_is_said(address, file, tmp_path):
    ran = run(file, "--address", address, "--out", tmp_path / "out")  # both scores are 0.25 here
    assert ran.exit_code == 0
    assert "check insertion > deletion failed" in ran.stderr
    assert [path.suffixes for path in (tmp_path / "out").iterdir()] == [[".sr", ".dcm"]]


@pytest.mark.parametrize(
    ("option", "value"), [("--window", "40"), ("--regions", "keep"), ("--outputs", "pdf"), ("--check", "insertion")]
)
def test_options_that_are_wrong(address, file, tmp_path, option, value):
    ran = run(file, "--address", address, "--out", tmp_path / "out", option, value)
    assert ran.exit_code in (1, 2)
    assert option.lstrip("-") in ran.stderr


def test_the_command_says_nothing_of_the_header(address, tmp_path):
    """Even where pydicom would quote it, of values that break the standard."""
    odd = image(ramp(), PatientWeight="63.25", PatientSize="1.7125")
    data = data_of(odd).replace(b"20240229", b"2024-02-").replace(b"19520317", b"1952X317")
    data = data.replace(b"63.25", b"63,25").replace(b"1.7125", b"1.712m")
    data = data.replace(UIDS[-1].encode(), UIDS[-1][:-1].encode() + b"X")
    path = tmp_path / "case.dcm"
    path.write_bytes(data)
    ran = subprocess.run(
        [sys.executable, "-m", "camserve_cli", "dicom", "explain", path, "--address", address,
         "--out", tmp_path / "out", "--outputs", "sc,sr,pm,seg,gsps", "--check", "none", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout + ran.stderr
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
    assert [each for each in secrets if each in said] == []


def test_the_library_logs_nothing_of_the_header(client, file, caplog):
    with caplog.at_level(logging.DEBUG):
        dicom.explain(client, file, check=None)
    assert [each for each in [*SECRETS.values(), *UIDS] if each in caplog.text] == []
