"""examples/inference_service.py: it classifies, and what it is not sure of is explained in the background."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
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

from camserve_server.service.server import Server

EXAMPLE = Path(__file__).parents[2] / "examples" / "inference_service.py"


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(address: str, path: str, data: bytes | None = None) -> Any:
    with urllib.request.urlopen(address + path, data, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_what_it_is_not_sure_of_is_explained(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "explained"
    options = ["--port", "0", "--address", server.address, "--share", "0", "--below", "0.6", "--out", str(out)]
    command = [sys.executable, str(EXAMPLE), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as running:
        try:
            assert running.stdout is not None
            found = re.fullmatch(r"classifies at (http://127\.0\.0\.1:\d+)/classify\n", running.stdout.readline())
            assert found
            sure = ask(found[1], "/classify", png(skimage.data.astronaut()))
            noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            unsure = ask(found[1], "/classify", png(noise))
            assert unsure["probability"] < 0.6
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(found[1], "/classify", b"no image")
            drawn = [each for each in (sure, unsure) if each["probability"] < 0.6]
            end = time.monotonic() + 60
            while (counts := ask(found[1], "/counts"))["explained"] < len(drawn) and time.monotonic() < end:
                time.sleep(0.05)
            assert counts == {"offered": 2, "explained": len(drawn), "failed": 0, "dropped": 0}
            assert f"1.{unsure['index']}.png" in [path.name for path in out.iterdir()]
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 0
        finally:
            running.kill()
