"""Layouts of layers: tokens in any place, and outputs that are not maps of the image."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from camserve_server.errors import Unservable
from camserve_server.models.probe import probe
from tests.support import as_model, call, explained, noise

X = noise(1, 3, 32, 32)
Place = Literal["before", "after", "none"]


class Block(nn.Module):
    """Residual block that mixes tokens. `first` is True for tokens [L, N, K]."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(12, 3, batch_first=not first)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mix(x, x, x)[0]
        return y


class Transformer(nn.Module):
    """Two blocks on 4×4 patches, with a class token before or after them, or the mean of all tokens."""

    def __init__(self, place: Place = "before", first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.randn(1, 1, 12))
        self.embed, self.blocks = nn.LayerNorm(12), nn.Sequential(Block(first), Block(first))
        self.fc, self.place, self.first = nn.Linear(12, 5), place, first

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        token = self.token.expand(len(x), -1, -1)
        parts = {"before": [token, x], "after": [x, token], "none": [x]}[self.place]
        x = self.embed(torch.cat(parts, dim=1))
        x = self.blocks(x.transpose(0, 1) if self.first else x)
        x = x.transpose(0, 1) if self.first else x
        logits: Tensor = self.fc({"before": x[:, 0], "after": x[:, -1], "none": x.mean(dim=1)}[self.place])
        return logits


@pytest.mark.parametrize("place", ["before", "after", "none"])
@pytest.mark.parametrize("method", ["grad-cam", "ablation-cam", "score-cam"])
def test_tokens_first_give_the_maps_of_the_batch_first(place: Place, method: str) -> None:
    maps = []
    for first in (False, True):
        model = as_model(Transformer(place, first))
        assert model.layer is not None
        assert (model.layer.name, model.layer.batch_dim) == ("blocks" if place == "none" else "blocks.0", int(first))
        assert (model.layer.prefix, model.layer.height, model.layer.width) == (int(place == "before"), 4, 4)
        maps.append(explained(model, X[0], call(model, method), [0, 1]).maps)
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=1e-5)


class Merging(nn.Module):
    """Tokens on 8×8 patches that merge to 4×4 without a convolution, in row order or not."""

    def __init__(self, in_order: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.merge, self.fc, self.in_order = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Linear(32, 8),
            nn.Linear(8, 5),
            in_order,
        )
        self.embed, self.last = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        N, x = len(x), self.patches(x)
        if not self.in_order:  # window by window
            x = x.view(N, 8, 8, 2, 4).transpose(2, 3).reshape(N, 8, 8, 8)
        x = self.embed(x.flatten(2).transpose(1, 2)).view(N, 4, 2, 4, 2, 8)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(N, 16, 32)
        logits: Tensor = self.fc(self.last(self.merge(x)).relu().mean(dim=1))
        return logits


def test_grids_of_tokens_are_inferred_by_halving() -> None:
    found = probe(Merging(in_order=True).eval(), X)
    assert found.layer is not None
    assert (found.layer.name, found.layer.form, found.layer.height, found.layer.width) == ("last", "tokens", 4, 4)
    assert [layer.name for layer in found.layers] == ["embed", "last"]


def test_tokens_in_an_unknown_order_are_refused() -> None:
    model = as_model(Merging(in_order=False).eval())
    assert [name for name, layer in model.spatial.items() if layer.form == "tokens"] == []
    for many in (False, True):
        with pytest.raises(Unservable, match=r"output last \[1, 16, 8\] are; set token_grid"):
            model.default_layers(many)


class Blocks(nn.Module):
    """Network whose second layer works on blocks × tokens × channels, as NesT does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.norm = nn.Conv2d(3, channels, 2, 2), nn.LayerNorm(channels)
        self.last, self.fc = nn.Conv2d(channels, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        N, K = len(x), self.last.in_channels
        x = self.patches(x).reshape(N, K, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1)
        x = self.norm(x.reshape(N, 16, 16, K))  # blocks × tokens × channels
        x = x.view(N, 4, 4, 4, 4, K).permute(0, 5, 1, 3, 2, 4).reshape(N, K, 16, 16)
        logits: Tensor = self.fc(self.last(x).relu().mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("channels", [6, 16, 24])
def test_blocks_of_tokens_are_not_maps(channels: int) -> None:
    found = probe(Blocks(channels).eval(), X)
    assert list(found.spatial) == ["patches", "last"]
    assert found.layer is not None
    assert found.layer.name == "last"


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
def test_maps_have_the_aspect_ratio_of_the_image(size: tuple[int, int]) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.split, self.fc = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(4), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).flatten(2).transpose(1, 2)
            x = x.reshape(*x.shape[:2], 2, 4).transpose(1, 2)
            x = self.split(x)  # [N, 2 heads, tokens, 4 channels]
            logits: Tensor = self.fc(x.transpose(1, 2).flatten(2).relu().mean(dim=1))
            return logits

    assert list(probe(Heads().eval(), noise(1, 3, *size)).spatial) == ["conv"]


class Embedded(nn.Module):
    """Convolution with a position embedding that has no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.position, self.act, self.fc = nn.Conv2d(3, 8, 4, 4), Position(), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        logits: Tensor = self.fc(self.act(x + self.position(x)).mean(dim=(2, 3)))
        return logits


class Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.values * 1


def test_outputs_without_a_batch_are_not_layers() -> None:
    assert list(probe(Embedded().eval(), X).spatial) == ["conv", "act"]
