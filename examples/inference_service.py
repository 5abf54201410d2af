"""An inference service that has a share of its requests explained, without waiting for that.

    camserve serve &
    python examples/inference_service.py --share 0.1 --below 0.6 --out explained
    curl --data-binary @dog.jpg http://127.0.0.1:8080/classify

It classifies by the network that camserve serves by default. What is drawn, and what it is not sure of, is explained by
the server, in the background; the pictures go to a folder. GET /counts says how many.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import torch

import camserve
from camserve.connection import DEFAULT_ADDRESS
from camserve_server.config import embedded_model
from camserve_server.models.load import load

MOST_BYTES = 20_000_000


class Classifier:
    """EfficientNet-Lite0 with its ImageNet weights, whoever serves it."""

    def __init__(self) -> None:
        self._model = load(embedded_model(), torch.device("cpu"))

    @torch.inference_mode()
    def __call__(self, photo: PIL.Image.Image) -> tuple[int, str, float]:
        """The likeliest class, its label and its probability."""
        pixels = np.asarray(photo.convert("RGB").resize((224, 224), PIL.Image.Resampling.BICUBIC), np.float32)
        x = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]
        probabilities = self._model.module(x).softmax(1)[0]
        index = int(probabilities.argmax())
        return index, self._model.labels[index], float(probabilities[index])


class Explained:
    """Writes the picture of each explanation into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, result: camserve.Result) -> None:
        if result.error is not None:
            print(f"request {result.index} is not explained: {result.error}", flush=True)
            return
        result.explanation.overlay().save(self._folder / f"{result.index}.{result.target.index}.png")


def handler(classify: Classifier, sampler: camserve.Sampler) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path != "/classify":
                return self._answer(404, {"error": "POST /classify"})
            size = int(self.headers.get("Content-Length", 0))
            if not 0 < size <= MOST_BYTES:
                return self._answer(413, {"error": f"a file of 1 to {MOST_BYTES} bytes"})
            sent = self.rfile.read(size)
            try:
                index, label, probability = classify(PIL.Image.open(io.BytesIO(sent)))
            except (OSError, PIL.Image.DecompressionBombError):
                return self._answer(400, {"error": "no image that can be read"})
            # All that the service has to do: it returns at once, and never raises.
            sampler.offer(sent, confidence=probability, target=index)
            return self._answer(200, {"index": index, "label": label, "probability": probability})

        def do_GET(self) -> None:
            if self.path != "/counts":
                return self._answer(404, {"error": "GET /counts"})
            return self._answer(200, asdict(sampler.counts))

        def _answer(self, code: int, content: dict[str, object]) -> None:
            body = json.dumps(content).encode() + b"\n"
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the standard library
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify photographs, and have a share of them explained.")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="of the camserve server")
    parser.add_argument("--share", type=float, default=0.01, help="of the requests, to be explained whatever they are")
    parser.add_argument("--below", type=float, default=0.6, help="explain all whose probability is less")
    parser.add_argument("--method", default="grad-cam")
    parser.add_argument("--out", type=Path, default=Path("explained"), help="where the pictures go")
    given = parser.parse_args()
    with (
        camserve.Client(given.address) as client,
        camserve.Sampler(
            client, Explained(given.out), share=given.share, below=given.below, method=given.method
        ) as sampler,
        ThreadingHTTPServer(("127.0.0.1", given.port), handler(Classifier(), sampler)) as service,
    ):
        print(f"classifies at http://127.0.0.1:{service.server_port}/classify", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            service.serve_forever()


if __name__ == "__main__":
    main()
