"""Commands against a real server."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import camserve
from camserve import Receipt
from camserve_cli import sanity_image
from camserve_cli.app import app
from camserve_server.config import Config, ModelConfig
from camserve_server.service.server import Server
from tests import nets
from tests.conftest import serving


def command(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"}, input=stdin)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--method", "poly-cam", "--metric", "deletion"),
        ("--method", "grad-cam", "--top-k", "3"),
        ("--method", "opti-cam", "--param", "steps=3", "--seed", "5"),
    ],
    ids=lambda options: options[1],
)
def test_replayed_map_is_bitwise_identical(
    server: Server, photo: Path, other_photo: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    arguments = ("--address", server.address)
    explained = command("explain", photo, *arguments, "--model", "tiny", "--out", tmp_path, *options)
    assert explained.exit_code == 0, explained.stderr
    result = command("replay", tmp_path / "cat.json", photo, *arguments)
    assert (result.exit_code, result.stdout.partition(",")[2]) == (0, " bit for bit\n"), result
    result = command("replay", tmp_path / "cat.json", other_photo, *arguments)
    assert (result.exit_code, result.stdout[:13]) == (1, "different inp"), result
    assert "largest difference" in result.stdout


@pytest.mark.slow
def test_map_of_a_small_response_can_be_replayed(server: Server, photo: Path, tmp_path: Path) -> None:
    arguments = ("--address", server.address, "--model", "tiny", "--out")
    for folder, options in (("large", ()), ("small", ("--map-dtype", "uint8", "--native-maps"))):
        explained = command("explain", photo, *arguments, tmp_path / folder, "--method", "grad-cam", *options)
        assert explained.exit_code == 0, explained.stderr
    large, small = (np.load(tmp_path / folder / "cat.npy") for folder in ("large", "small"))
    assert small.dtype == np.float32
    np.testing.assert_allclose(small, large, rtol=0, atol=0.01)
    assert not np.array_equal(small, large)
    result = command("replay", tmp_path / "small" / "cat.json", photo, "--address", server.address)
    assert (result.exit_code, result.stdout) == (0, "the same map, bit for bit\n"), result
    official = ("--method", "poly-cam", "--param", "variant=official", "--native-maps")
    refused = command("explain", photo, *arguments, tmp_path, *official)
    assert refused.exit_code == 1
    assert "omit --native-maps" in refused.stderr


@pytest.mark.slow
def test_receipt_digests_match_the_saved_maps(server: Server, photo: Path, tmp_path: Path) -> None:
    command("explain", photo, "--address", server.address, "--model", "tiny", "--out", tmp_path, "--top-k", 2)
    receipt = Receipt.from_json((tmp_path / "cat.json").read_bytes())
    maps = [np.load(tmp_path / f"cat.{index}.npy") for index in receipt.targets]
    digests = [f"sha256:{hashlib.sha256(each.astype('<f4').tobytes()).hexdigest()}" for each in maps]
    assert list(receipt.map_digests) == digests


@pytest.mark.slow
def test_replay_reports_a_modified_digest(server: Server, photo: Path, tmp_path: Path) -> None:
    command("explain", photo, "--address", server.address, "--model", "tiny", "--out", tmp_path)
    record = json.loads((tmp_path / "cat.json").read_text())
    record["receipt"]["map_digests"] = ["sha256:" + "0" * 64]
    result = command("replay", "-", photo, "--address", server.address, stdin=json.dumps(record))
    assert (result.exit_code, result.stdout[:17]) == (1, "not the same map\n")
    assert re.search(r"map_digests\.\d +sha256:000000000000… +sha256:", result.stdout)
    assert len(result.stdout.splitlines()) == 5, "only the digest differs"
    assert result.stdout.splitlines()[-1].startswith("The receipts agree in all else.")


@pytest.mark.slow
def test_list_prints_models_layers_and_methods(server: Server) -> None:
    with camserve.Client(server.address) as client:
        tiny, methods = client.models()[1], client.methods("tiny")
    arguments = ("--address", server.address, "--model", "tiny")
    listed = {what: command("list", what, *arguments).stdout for what in ("models", "layers", "methods")}
    assert tiny.digest in listed["models"]
    assert all(layer.name in listed["layers"] for layer in tiny.named_layers)
    assert all(method.name in listed["methods"] and method.paper in listed["methods"] for method in methods)
    page = command("list", "methods", "poly-cam", *arguments).stdout
    [poly] = [method for method in methods if method.name == "poly-cam"]
    assert all(line in page for line in poly.equations.splitlines())


@contextmanager
def server_with_seed(seed: int, folder: Path) -> Iterator[str]:
    """Yield the address of a server whose model has random weights of this seed."""
    weights = folder / f"{seed}.safetensors"
    save_file(nets.tiny_cnn(seed).state_dict(), weights)
    source = "python:tests.nets:tiny_cnn"
    tiny = ModelConfig(name="tiny", source=source, weights=str(weights), input_size=(32, 32), batch_size=4)
    with serving(Config(listen="127.0.0.1:0", models=[tiny])) as running:
        yield running.address


@pytest.mark.slow
def test_replay_reports_other_weights(photo: Path, tmp_path: Path) -> None:
    with server_with_seed(1, tmp_path) as address:
        command("explain", photo, "--address", address, "--out", tmp_path, "--method", "grad-cam", "--target", 2)
    with server_with_seed(2, tmp_path) as address:
        result = command("replay", tmp_path / "cat.json", photo, "--address", address)
    assert result.exit_code == 1
    assert result.stdout.startswith("not the same map\n")
    differs = [line.split()[0] for line in result.stdout.split("\n\n")[1].splitlines()[1:]]
    assert differs == ["model_digest", "map_digests.2"]


@pytest.mark.slow
def test_sanity_writes_an_image_and_prints_a_table(server: Server, photo: Path, tmp_path: Path) -> None:
    image_path = tmp_path / "checks" / "cat.png"
    arguments = (
        "--address",
        server.address,
        "--model",
        "tiny",
        "--method",
        "layer-cam",
        "--steps",
        "3",
        "--out",
        image_path,
    )
    result = command("sanity", photo, *arguments)
    assert result.exit_code == 0, result.stderr
    *_, mean, path = result.stdout.splitlines()
    assert path == str(image_path)
    steps = [line.split() for line in result.stdout.splitlines() if line[:1].isdigit()]
    assert [step[0] for step in steps] == ["1", "2", "3"] and steps[-1][-4].startswith("c1")
    for i, value in enumerate(map(float, mean.split()[1:])):
        assert value == pytest.approx(np.mean([float(step[i - 3]) for step in steps]), abs=2e-3)
    with PIL.Image.open(image_path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The image contains the three curves in their colours.
    for _, colour, _ in sanity_image.SERIES.values():
        assert (np.abs(pixels - colour).sum(axis=2) == 0).sum() > 100

    alone = command("sanity", photo, *arguments[:-1], tmp_path / "alone.png", "--order", "independent")
    assert alone.exit_code == 0 and alone.stdout.splitlines()[-2] != mean
    refused = command("sanity", photo, "--address", server.address, "--model", "tiny", "--method", "raw-attention")
    assert refused.exit_code == 1 and refused.stderr.startswith("error: ") and not refused.stdout
