"""examples/inference_service.py: it classifies images and explains uncertain predictions in the background."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import skimage.data
from numpy.typing import NDArray

from camserve_server.service.server import Server
from tests.processes import LIMIT_S, started

EXAMPLE = Path(__file__).parents[2] / "examples" / "inference_service.py"


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fetch(address: str, path: str, data: bytes | None = None) -> Any:
    with urllib.request.urlopen(address + path, data, timeout=LIMIT_S) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_uncertain_predictions_are_explained(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "explained"
    options = ["--port", "0", "--address", server.address, "--share", "0", "--below", "0.6", "--out", str(out)]
    command = [sys.executable, str(EXAMPLE), *options]
    with started(command) as process:
        assert process.stdout is not None
        match = re.fullmatch(r"classifies at (http://127\.0\.0\.1:\d+)/classify\n", process.stdout.readline())
        assert match
        url = match[1]
        sure = fetch(url, "/classify", png(skimage.data.astronaut()))
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        unsure = fetch(url, "/classify", png(noise))
        assert unsure["probability"] < 0.6
        with pytest.raises(urllib.error.HTTPError, match="400"):
            fetch(url, "/classify", b"no image")
        explained = [each for each in (sure, unsure) if each["probability"] < 0.6]
        end = time.monotonic() + LIMIT_S
        while (counts := fetch(url, "/counts"))["explained"] < len(explained) and time.monotonic() < end:
            time.sleep(0.05)
        assert counts == {"offered": 2, "explained": len(explained), "failed": 0, "dropped": 0}
        assert f"1.{unsure['index']}.png" in [path.name for path in out.iterdir()]
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
