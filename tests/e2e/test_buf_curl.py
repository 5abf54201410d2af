"""The commands of "Calls with buf curl" in docs/client.md, with the real buf on real servers."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import trustme

import camserve
from camserve_server.config import Config, ModelConfig, TLSConfig, TokenConfig
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.credentials import certify, hashed
from tests.processes import LIMIT_S, ROOT, environment, patient_client

pytestmark = pytest.mark.slow

BUF = ROOT / "node_modules" / ".bin" / "buf"
SECTION = (ROOT / "docs" / "client.md").read_text(encoding="utf-8").partition("### Calls with buf curl\n")[2]
LISTS, IMAGE, SECURED = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"


def run(commands: str, folder: Path, address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run commands of the page in the folder, with the address of a server."""
    if not (BUF.exists() and shutil.which("node")):
        pytest.skip("buf is not installed; run `make node_modules/.installed`")
    path = {"PATH": f"{BUF.parent}:{environment()['PATH']}", "BUF_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", re.sub(r"(127\.0\.0\.1|camserve\.example):50051", address, commands)],
        cwd=folder,
        env=environment(**path, **variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def documents(text: str) -> list[Any]:
    """Return the JSON documents of an output, one after another."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def test_lists_of_services_methods_and_models(server: Server, tmp_path: Path) -> None:
    ran = run(LISTS, tmp_path, server.address)
    assert ran.returncode == 0, ran.stderr
    names, json_start, rest = ran.stdout.partition("{")
    services = names.split()
    assert {"camserve.v1.ExplainService", "grpc.health.v1.Health", "inference.GRPCInferenceService"} <= {*services}
    assert "camserve.v1.ExplainService/ExplainStream" in services
    models, health = documents(json_start + rest)
    assert [each["name"] for each in models["models"]][1] == "tiny"
    assert health == {"status": "SERVING"}


def test_image_and_stream(server: Server, tmp_path: Path) -> None:
    shutil.copy(PHOTOGRAPH, tmp_path / "dog.jpg")
    ran = run(IMAGE, tmp_path, server.address)
    assert ran.returncode == 0, ran.stderr
    explained, *events = documents(ran.stdout)
    with patient_client(server.address) as client:
        there = client.explain(PHOTOGRAPH, method="grad-cam")
    for each in (explained, events[-1]["result"]):
        [found] = each["maps"]
        values = np.frombuffer(base64.b64decode(found["saliency"]["data"]), "<f4")
        np.testing.assert_array_equal(values.reshape(found["saliency"]["shape"]), there.saliency)
        assert found["target"]["label"] == there.target.label


def test_error_has_a_message_details_and_an_exit_status(server: Server, tmp_path: Path) -> None:
    shutil.copy(PHOTOGRAPH, tmp_path / "dog.jpg")
    ran = run(IMAGE.replace("grad-cam", "no-cam"), tmp_path, server.address)
    assert ran.returncode == 40
    error = json.loads(ran.stderr)
    assert error["code"] == "not_found"
    assert "there is no method 'no-cam'" in error["message"]
    assert "google.rpc.ErrorInfo" in {each["type"] for each in error["details"]}


def test_tls_and_token(tmp_path: Path) -> None:
    ca = trustme.CA()
    for name in ("server", "client"):
        certify(ca, tmp_path, name)
    tls = TLSConfig(
        certificate=str(tmp_path / "server.pem"), key=str(tmp_path / "server.key"), client_ca=str(tmp_path / "ca.pem")
    )
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=2)
    tokens = [TokenConfig(name="anna", sha256=hashed("b"))]
    with serving(Config(listen="127.0.0.1:0", tls=tls, tokens=tokens, models=[tiny])) as secured:
        ran = run(SECURED, tmp_path, secured.address, CAMSERVE_TOKEN="b")
        assert ran.returncode == 0, ran.stderr
        [methods] = documents(ran.stdout)
        with camserve.Client(
            secured.address,
            ca=tmp_path / "ca.pem",
            certificate=tmp_path / "client.pem",
            key=tmp_path / "client.key",
            token="b",
        ) as client:
            assert [each["name"] for each in methods["methods"]] == [each.name for each in client.methods()]
        refused = run(SECURED, tmp_path, secured.address, CAMSERVE_TOKEN="wrong")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "failed to find service" in refused.stderr
