"""`camserve config check` and `camserve token`: a configuration can be checked before the server starts."""

from __future__ import annotations

import asyncio
import hashlib
import tomllib
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from camserve_cli.app import app
from camserve_server.config import TokenConfig, read_config
from camserve_server.errors import ConfigError
from camserve_server.models.sources import build_network
from camserve_server.service.server import Server
from tests import nets
from tests.credentials import certify, hashed

SECRET = "camserve_triage-0123456789"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("options", [[], ["--admin"]])
def test_token_command_prints_a_secret_and_its_table(options: list[str]) -> None:
    output = run("token", "triage", *options).stdout
    secret = next(line for line in output.splitlines() if line.startswith("camserve_"))
    assert secret not in run("token", "triage").stdout, "each secret is new"
    assert len(secret) > 40
    [table] = tomllib.loads(output[output.index("[[tokens]]") :])["tokens"]
    assert table == {"name": "triage", "sha256": hashed(secret), **({"admin": True} if options else {})}
    assert TokenConfig(**table).admin == bool(options)
    assert "letters, digits" in run("token", "a b").stderr


CONFIG = f"""
health_listen = "127.0.0.1:50052"

[tls]
certificate = "server.pem"
key = "server.key"
client_ca = "ca.pem"

[[tokens]]
name = "triage"
sha256 = "{hashed(SECRET)}"

[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
weights = "tiny.safetensors"
weights_sha256 = "PINNED"
labels = "labels.txt"
input_size = [32, 32]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    ca = trustme.CA()
    certify(ca, tmp_path)
    certify(ca, tmp_path, "other")
    save_file(nets.tiny_cnn(seed=5).state_dict(), tmp_path / "tiny.safetensors")
    (tmp_path / "labels.txt").write_text("\n".join("abcdefg"))
    (tmp_path / "encrypted.key").write_bytes(
        serialization.load_pem_private_key((tmp_path / "server.key").read_bytes(), None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    path = tmp_path / "camserve.toml"
    pin = hashlib.sha256((tmp_path / "tiny.safetensors").read_bytes()).hexdigest()
    path.write_text(CONFIG.replace("PINNED", pin))
    return path


def test_check_shows_the_parsed_configuration(config: Path) -> None:
    checked = run("config", "check", "--config", config)
    assert (checked.exit_code, checked.stderr) == (0, "")
    lines = [line.split() for line in checked.stdout.splitlines()]
    for line in (
        ["listen", '"127.0.0.1:50051"'],
        ["tls.client_ca", '"ca.pem"'],
        ["tokens.triage.sha256", "set"],
        ["models.tiny.source", '"python:tests.nets:tiny_cnn"'],
        ["models.tiny.input_size", "[32,", "32]"],
    ):
        assert line in lines
    assert hashed(SECRET) not in checked.stdout


WRONG = {
    "unknown key": ("health_listen", "helth_listen", "helth_listen"),
    "address without a host": ('"127.0.0.1:50052"', '"50052"', "health_listen"),
    "missing certificate": ('"server.pem"', '"none.pem"', "tls.certificate"),
    "certificate file without a certificate": ('"server.pem"', '"server.key"', "tls.certificate"),
    "missing key": ('"server.key"', '"none.key"', "tls.key"),
    "key file without a key": ('"server.key"', '"server.pem"', "tls.key"),
    "key of another certificate": ('"server.key"', '"other.key"', "tls.key"),
    "encrypted key": ('"server.key"', '"encrypted.key"', "tls.key"),
    "CA file without a certificate": ('"ca.pem"', '"labels.txt"', "tls.client_ca"),
    "subjects without a CA": ('client_ca = "ca.pem"', 'allowed_subjects = ["pacs"]', "tls"),
    "token in plaintext": (hashed(SECRET), SECRET, "tokens.triage.sha256"),
    "missing weights": ('"tiny.safetensors"', '"none.safetensors"', "models.tiny.weights"),
    "weights with another digest": (
        'weights_sha256 = "',
        'weights_sha256 = "' + 64 * "0" + '" # "',
        "models.tiny.weights_sha256",
    ),
    "digest without weights": ('weights = "tiny.safetensors"', "", "models.tiny.weights_sha256"),
    "missing labels": ('"labels.txt"', '"none.txt"', "models.tiny.labels"),
    "unknown module": ("tests.nets:", "tests.no_nets:", "models.tiny.source"),
    "unknown network of torchvision": ("python:tests.nets:tiny_cnn", "torchvision:resnet51", "models.tiny.source"),
    "unknown network of timm": ("python:tests.nets:tiny_cnn", "timm:resnet51", "models.tiny.source"),
}


@pytest.mark.parametrize(("old", "new", "key"), WRONG.values(), ids=WRONG)
def test_check_names_the_wrong_key(config: Path, old: str, new: str, key: str) -> None:
    assert config.read_text().count(old) == 1
    config.write_text(config.read_text().replace(old, new))
    checked = run("config", "check", "--config", config)
    assert checked.exit_code == 2
    assert any(line.startswith(f"error: {key}: ") for line in checked.stderr.splitlines()), checked.stderr
    assert SECRET not in checked.stderr


def test_check_lists_all_errors(config: Path) -> None:
    config.write_text(config.read_text().replace("labels.txt", "none.txt").replace("server.pem", "none.pem"))
    assert run("config", "check", "--config", config).stderr.count("error: ") == 2
    config.write_text(config.read_text() + "batch_size = 0\nno_such_key = 1\n")
    errors = run("config", "check", "--config", config).stderr.splitlines()
    assert [line.split(": ")[:2] for line in errors] == [
        ["error", "models.tiny.batch_size"],
        ["error", "models.tiny.no_such_key"],
    ]


@pytest.mark.parametrize("key", ["certificate", "key"])
def test_server_does_not_start_without_its_tls_files(config: Path, key: str) -> None:
    config.write_text(config.read_text().replace(f'{key} = "server', f'{key} = "none'))

    async def start() -> None:
        server = Server(read_config(config, listen="127.0.0.1:0"))
        try:
            await server.start()
        finally:
            await server.stop(0)

    with pytest.raises(ConfigError, match=rf"^tls\.{key}: "):
        asyncio.run(start())


def test_weights_with_another_digest_are_refused(config: Path) -> None:
    [model] = read_config(config).models
    assert build_network(model, "models.tiny")
    save_file(nets.tiny_cnn(seed=6).state_dict(), config.parent / "tiny.safetensors")
    with pytest.raises(ConfigError, match=r"^models\.tiny\.weights_sha256: .* its sha256 is [0-9a-f]{64}"):
        build_network(model, "models.tiny")
