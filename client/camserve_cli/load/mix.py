"""Requests of a load: methods by weight, images in equal shares.

Each request is serialised once and sent many times.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

__all__ = ["Mix", "PreparedRequest", "photograph"]

_DRAWN_AT_ONCE = 4096


@dataclass(frozen=True)
class PreparedRequest:
    """Serialised request.

    Attributes:
        method: Label of the method.
        image: Index of the image.
        message: The serialised ExplainRequest.
    """

    method: str
    image: int
    message: bytes


@dataclass(frozen=True)
class Mix:
    """Requests of several methods, with a weight for each method.

    Attributes:
        requests: For each method, one request for each image.
        weights: The weight of each method, above 0.
    """

    requests: Sequence[Sequence[PreparedRequest]]
    weights: Sequence[float]

    @property
    def methods(self) -> list[str]:
        """Labels of the methods."""
        return [requests[0].method for requests in self.requests]

    def draw(self, seed: int) -> Iterator[PreparedRequest]:
        """Yield random requests without end. The same seed yields the same requests."""
        random = np.random.default_rng([seed, 1])
        shares = np.array(self.weights) / sum(self.weights)
        while True:
            methods = random.choice(len(shares), _DRAWN_AT_ONCE, p=shares)
            images = random.integers(len(self.requests[0]), size=_DRAWN_AT_ONCE)
            for method, image in zip(methods.tolist(), images.tolist(), strict=True):
                yield self.requests[method][image]


@functools.cache
def photograph(height: int = 384, width: int = 512) -> bytes:
    """Return a synthetic JPEG file that costs as much to send and to decode as a photograph.

    The pixels are always the same. As in natural images, the amplitude spectrum falls with 1/f and the colour channels
    are correlated.
    """
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    amplitude = 1 / np.maximum(frequency, 1)

    def field() -> NDArray[np.float64]:
        spectrum = np.fft.rfft2(random.standard_normal((height, width))) * amplitude
        values: NDArray[np.float64] = np.fft.irfft2(spectrum, (height, width))
        values -= values.mean()
        values /= values.std()
        return values

    grey = field()
    pixels = np.stack([128 + 48 * (grey + 0.3 * field()) for _ in range(3)], axis=-1)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
