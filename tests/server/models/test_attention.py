"""Attention weights, compared with those that the libraries compute without fused kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.models.attention import attention_weights, attention_with_output, is_supported
from camserve_server.models.probe import probe
from camserve_server.torch_setup import torchvision_ops  # noqa: F401
from tests import nets
from tests.support import noise

import timm  # isort: skip
from timm.layers.attention import Attention  # isort: skip


def run_unfused(net: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Return each attention module of timm with its input and its weights, which are the input of its dropout."""
    modules: list[Any] = [m for m in net.modules() if isinstance(m, Attention)]
    inputs: list[Tensor] = []
    weights: list[Tensor] = []
    handles = []
    for module in modules:
        module.fused_attn = False
        handles.append(module.register_forward_pre_hook(lambda m, args: inputs.append(args[0])))
        handles.append(module.attn_drop.register_forward_hook(lambda m, args, output: weights.append(output)))
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return list(zip(modules, inputs, weights, strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("", {}),
        ("vit_tiny_patch16_224", {"img_size": 64}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
        ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True}),
    ],
)
def test_weights_of_timms_transformers(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, **options).eval() if name else nets.tiny_vit()
    size = options.get("img_size", 32)
    calls = run_unfused(net, noise(2, 3, size, size))
    assert len(calls) == (12 if name else 3)
    for module, x, weights in calls:
        with torch.no_grad():
            A, output = attention_with_output(module, x)
            torch.testing.assert_close(A, weights, rtol=0, atol=1e-6)
            torch.testing.assert_close(output, module(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(A.sum(dim=-1), torch.ones(A.shape[:-1]))


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"attn_head_dim": 10}])
def test_output_with_the_options_of_timms_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = Attention(24, num_heads=3, qkv_bias=True, norm_layer=nn.LayerNorm, **options).eval()
    torch.testing.assert_close(
        attention_with_output(module, noise(2, 7, 24))[1], module(noise(2, 7, 24)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_torchs_multihead_attention(bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True).eval()
    x = noise(2, 7, 24)
    weight, offset = module.in_proj_weight, module.in_proj_bias if bias else torch.zeros(72)
    q, k = ((x @ weight[i : i + 24].T + offset[i : i + 24]).reshape(2, 7, 3, 8) for i in (0, 24))
    expected = torch.stack([q[:, :, h] @ k[:, :, h].transpose(1, 2) / 8**0.5 for h in range(3)], dim=1).softmax(dim=-1)
    theirs = module(x, x, x, need_weights=True, average_attn_weights=False)[1]
    A = attention_weights(module, x)
    assert A.shape == (2, 3, 7, 7)
    torch.testing.assert_close(A, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(A, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_weights_are_differentiable_and_trigger_no_hook(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, batch_first=True) if kind == "torch" else Attention(24, num_heads=3)
    for part in module.eval().modules():
        part.register_forward_hook(lambda m, args, output: pytest.fail("a hook ran"))
        part.register_forward_pre_hook(lambda m, args: pytest.fail("a hook ran"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = noise(2, 7, 24).requires_grad_()
    [gradient] = torch.autograd.grad(attention_weights(module, x)[:, :, 0, 3].sum(), x)
    assert gradient[:, 0].any()
    assert gradient[:, 3].any()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_have_the_dtype_of_the_input() -> None:
    module = nn.MultiheadAttention(24, 3, batch_first=True).eval().double()
    assert attention_weights(module, noise(1, 7, 24).double()).dtype == torch.float64


class Doubled(Attention):
    """Subclass with another output."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x, attn_mask, is_causal)


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(24, 3),  # [L, N, D]
        nn.MultiheadAttention(24, 3, batch_first=True, kdim=12, vdim=12),
        nn.MultiheadAttention(24, 3, batch_first=True, add_bias_kv=True),
        nn.MultiheadAttention(24, 3, batch_first=True, add_zero_attn=True),
        timm.layers.attention.AttentionRope(24, num_heads=3),
        timm.models.beit.Attention(24, num_heads=3),
        timm.models.swin_transformer.WindowAttention(24, num_heads=3, window_size=7),
        Doubled(24, num_heads=3),
        nn.Linear(24, 24),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_not_supported(module: nn.Module) -> None:
    assert not is_supported(module)
    with pytest.raises(TypeError, match="not supported"):
        attention_weights(module, noise(1, 7, 24))


class Transformer(nn.Module):
    """Patches, one attention module and a head on the class token. The attention is called with `options`."""

    def __init__(self, timms: bool, mean: bool = True, **options: object) -> None:
        super().__init__()
        self.patches, self.fc = nn.Conv2d(3, 24, 8, 8), nn.Linear(24, 5)
        self.attn = Attention(24, num_heads=3) if timms else nn.MultiheadAttention(24, 3, batch_first=True)
        self.timms, self.options, self.calls = timms, options, 1

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.patches(x).flatten(2).transpose(1, 2), (0, 0, 1, 0))  # the class token is zeros
        for _ in range(self.calls):
            x = x + (self.attn(x, **self.options) if self.timms else self.attn(x, x, x, **self.options)[0])
        logits: Tensor = self.fc(x[:, 0])
        return logits


@pytest.mark.parametrize("timms", [True, False])
def test_attention_with_a_mask_or_several_calls_is_not_detected(timms: bool) -> None:
    x = noise(1, 3, 32, 24)
    structure = probe(Transformer(timms).eval(), x)
    assert (structure.attention, structure.attention_prefix, structure.attention_grid) == (("attn",), 1, (4, 3))
    masked = Transformer(timms, attn_mask=torch.full((13, 13), -9.0).triu(1)).eval()
    assert probe(masked, x).attention == ()
    twice = Transformer(timms).eval()
    twice.calls = 2
    assert probe(twice, x).attention == ()


class Mixing(nn.Module):
    """Module of an unknown class, in the place of attention."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return x.softmax(dim=1)


@pytest.mark.parametrize("other", [Doubled(48, num_heads=3), Mixing()])
def test_one_unsupported_module_hides_all_attention(other: nn.Module) -> None:
    net: Any = nets.tiny_vit()
    assert probe(net, noise(1, 3, 32, 32)).attention == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    net.blocks[1].attn = other
    assert probe(net, noise(1, 3, 32, 32)).attention == ()


def test_attention_of_torchs_encoder_is_detected_on_its_fast_path() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.fc = nn.Conv2d(3, 24, 8, 8), nn.Linear(24, 5)
            layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            tokens = nn.functional.pad(self.patches(x).flatten(2).transpose(1, 2), (0, 0, 1, 0))
            logits: Tensor = self.fc(self.encoder(tokens)[:, 0])
            return logits

    structure = probe(Net().eval(), noise(1, 3, 32, 24))
    assert structure.attention == ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")
    assert structure.layer is not None
    assert structure.layer.name == "encoder.layers.0"


class Tokens(nn.Module):
    """One attention module. The logits depend on the token at `place`, or on the mean of all tokens if it is None."""

    def __init__(self, place: int | None, *, before: int = 0, after: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.norm, self.fc = nn.Conv2d(3, 24, 8, 8), nn.LayerNorm(24), nn.Linear(24, 5)
        self.attn = nn.MultiheadAttention(24, 3, batch_first=True)
        self.extra, self.place, self.before = nn.Parameter(torch.randn(1, before + after, 24)), place, before

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.norm(torch.cat([self.extra[:, : self.before], x, self.extra[:, self.before :]], dim=1))
        x = x + self.attn(x, x, x)[0]
        y: Tensor = self.fc(x.mean(dim=1) if self.place is None else x[:, self.place])
        return y


def test_attention_is_detected_only_with_a_leading_class_token() -> None:
    x = noise(1, 3, 32, 24)
    assert probe(Tokens(0, before=1).eval(), x).attention == ("attn",)
    assert probe(Tokens(0, before=3).eval(), x).attention == ("attn",)
    for place, before in ((None, 0), (None, 1), (0, 0), (1, 2)):
        assert probe(Tokens(place, before=before).eval(), x).attention == ()
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    for more in ({"class_token": False}, {"class_token": False, "reg_tokens": 4}, {}):
        net = timm.models.VisionTransformer(**options, **more, global_pool="avg", num_classes=7).eval()
        assert probe(net, noise(1, 3, 32, 32)).attention == ()


def test_tokens_before_a_trailing_class_token_are_a_layer() -> None:
    structure = probe(Tokens(-1, after=1).eval(), noise(1, 3, 32, 24))
    layer = structure.spatial["norm"]
    assert (layer.prefix, layer.height, layer.width) == (0, 4, 3)
    assert structure.attention == ()
