"""What is asked: methods by their weights, images in equal shares. A request is encoded once, and sent many times."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

__all__ = ["Ask", "Mix", "photograph"]

_DRAWN_AT_ONCE = 4096


@dataclass(frozen=True)
class Ask:
    """A request that can be made: by the method of that label, of the image of that place, encoded."""

    method: str
    image: int
    request: bytes


@dataclass(frozen=True)
class Mix:
    """For each method the requests that it may be, one for each image, and its weight among the methods."""

    asks: Sequence[Sequence[Ask]]
    weights: Sequence[float]

    @property
    def methods(self) -> list[str]:
        """Their labels."""
        return [asks[0].method for asks in self.asks]

    def draw(self, seed: int) -> Iterator[Ask]:
        """Without end: each drawn by the weights. The same seed draws the same."""
        chance = np.random.default_rng([seed, 1])
        shares = np.array(self.weights) / sum(self.weights)
        while True:
            methods = chance.choice(len(shares), _DRAWN_AT_ONCE, p=shares)
            images = chance.integers(len(self.asks[0]), size=_DRAWN_AT_ONCE)
            for method, image in zip(methods.tolist(), images.tolist(), strict=True):
                yield self.asks[method][image]


@functools.cache
def photograph(height: int = 384, width: int = 512) -> bytes:
    """A JPEG file of nothing, always of the same pixels, that takes as much to send and to decode as a photograph.

    Its spectrum falls as that of natural images does, with 1/f, and its colours go mostly together.
    """
    chance = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    fall = 1 / np.maximum(frequency, 1)

    def field() -> NDArray[np.float64]:
        spectrum = np.fft.rfft2(chance.standard_normal((height, width))) * fall
        made: NDArray[np.float64] = np.fft.irfft2(spectrum, (height, width))
        made -= made.mean()
        made /= made.std()
        return made

    grey = field()
    pixels = np.stack([128 + 48 * (grey + 0.3 * field()) for _ in range(3)], axis=-1)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
