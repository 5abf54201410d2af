"""Connection options of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import trustme
from typer.testing import CliRunner, Result

from camserve_cli.app import app
from tests.client.fake_server import Servicer, listening


def test_connection_options_come_from_arguments_or_the_environment(
    servicer: Servicer, authority: trustme.CA, certificate: tuple[bytes, bytes], tmp_path: Path
) -> None:
    key, chain = certificate
    files = {"CAMSERVE_CA": authority.cert_pem.bytes(), "CAMSERVE_CERT": chain, "CAMSERVE_KEY": key}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "token").write_text("from-file\n")
    environment = {name: str(tmp_path / name) for name in files}
    options = [text for name in files for text in (f"--{name.removeprefix('CAMSERVE_').lower()}", str(tmp_path / name))]

    def listed(*arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(app, ["list", "metrics", "--json", *arguments], env=environment)

    credentials = grpc.ssl_server_credentials([certificate], files["CAMSERVE_CA"], require_client_auth=True)
    with listening(servicer, credentials) as address:
        ran = listed(**environment, CAMSERVE_ADDRESS=address, CAMSERVE_TOKEN="from-environment")
        assert json.loads(ran.stdout)["name"] == "insertion", ran.stderr
        assert servicer.metadata["authorization"] == "Bearer from-environment"
        ran = listed("--address", address, *options, "--token-file", str(tmp_path / "token"))
        assert json.loads(ran.stdout)["name"] == "insertion", ran.stderr
        assert servicer.metadata["authorization"] == "Bearer from-file"
    ran = listed("--address", "explain.example:1", CAMSERVE_TOKEN="secret")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: a token for explain.example:1 requires TLS")
