"""Inference service that requests explanations for a sample of its predictions without waiting for them.

    camserve serve &
    python examples/inference_service.py --share 0.1 --below 0.6 --out explained
    curl --data-binary @dog.jpg http://127.0.0.1:8080/classify

The service classifies with the network that camserve serves by default. The server explains a random sample of the
predictions and all predictions with a low probability, in the background. The overlays are written to a folder.
GET /counts returns the numbers of explanations.
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

MAX_BYTES = 20_000_000


class Classifier:
    """EfficientNet-Lite0 with its ImageNet weights, running in this process."""

    def __init__(self) -> None:
        self._model = load(embedded_model(), torch.device("cpu"))

    @torch.inference_mode()
    def __call__(self, photo: PIL.Image.Image) -> tuple[int, str, float]:
        """Classify a photograph.

        Returns:
            The most probable class, its label and its probability.
        """
        pixels = np.asarray(photo.convert("RGB").resize((224, 224), PIL.Image.Resampling.BICUBIC), np.float32)
        x = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]
        probabilities = self._model.module(x).softmax(1)[0]
        index = int(probabilities.argmax())
        return index, self._model.labels[index], float(probabilities[index])


class OverlayWriter:
    """Callback that writes the overlay of each explanation to a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, result: camserve.Result) -> None:
        """Write the overlay, or print the error of a failed request."""
        if result.error is not None:
            print(f"request {result.index} was not explained: {result.error}", flush=True)
            return
        result.explanation.overlay().save(self._folder / f"{result.index}.{result.target.index}.png")


def handler(classify: Classifier, sampler: camserve.Sampler) -> type[BaseHTTPRequestHandler]:
    """Return the HTTP request handler of the service."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path != "/classify":
                return self._answer(404, {"error": "POST /classify"})
            size = int(self.headers.get("Content-Length", 0))
            if not 0 < size <= MAX_BYTES:
                return self._answer(
                    413, {"error": f"the body has {size} bytes; expected an image file of 1 to {MAX_BYTES} bytes"}
                )
            body = self.rfile.read(size)
            try:
                index, label, probability = classify(PIL.Image.open(io.BytesIO(body)))
            except (OSError, PIL.Image.DecompressionBombError):
                return self._answer(400, {"error": "the body is not an image file that can be read"})
            # The only addition to the service. `offer` returns at once and never raises an exception.
            sampler.offer(body, confidence=probability, target=index)
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

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the standard library
            pass

    return Handler


def main() -> None:
    """Parse the command line and run the service."""
    parser = argparse.ArgumentParser(description="Classify photographs, and request explanations for a sample of them.")
    parser.add_argument("--port", type=int, default=8080, help="port of the service; 0 selects a free port")
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="address of the camserve server")
    parser.add_argument(
        "--share", type=float, default=0.01, help="share of the predictions to explain, chosen at random"
    )
    parser.add_argument("--below", type=float, default=0.6, help="explain all predictions with a lower probability")
    parser.add_argument("--method", default="grad-cam", help="method of the explanations")
    parser.add_argument("--out", type=Path, default=Path("explained"), help="folder for the overlays")
    options = parser.parse_args()
    with (
        camserve.Client(options.address) as client,
        camserve.Sampler(
            client, OverlayWriter(options.out), share=options.share, below=options.below, method=options.method
        ) as sampler,
        ThreadingHTTPServer(("127.0.0.1", options.port), handler(Classifier(), sampler)) as service,
    ):
        print(f"classifies at http://127.0.0.1:{service.server_port}/classify", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            service.serve_forever()


if __name__ == "__main__":
    main()
