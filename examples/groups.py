"""The methods in groups that help to choose: the order of docs/methods.md and of the figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Group:
    """Methods of one kind, and what is common to them."""

    title: str
    text: str
    names: tuple[str, ...]


GROUPS = (
    Group(
        "Poly-CAM and Opti-CAM",
        "The two that camserve was built for: fine maps of the class from several layers, and maps that are optimised\n"
        "([what the last u is](decisions/0006-the-last-iterate-of-opti-cam.md)).",
        ("poly-cam", "poly-cam+", "poly-cam-", "opti-cam"),
    ),
    Group(
        "Class activation maps from gradients and weights",
        "One pass, or a few: for an answer at once. Those of one layer are as coarse as it is. Of the last layer of a\n"
        "network that ends in global average pooling and one linear layer, as EfficientNet-Lite0 does, CAM, Grad-CAM,\n"
        "XGrad-CAM and HiRes-CAM give the same map but for what is negative.",
        (
            "cam",
            "grad-cam",
            "grad-cam++",
            "smooth-grad-cam++",
            "xgrad-cam",
            "hires-cam",
            "layer-cam",
            "zoom-cam",
            "eigen-cam",
        ),
    ),
    Group(
        "Class activation maps from masks",
        "One layer, and a forward pass or more for each of its channels. No gradients.",
        ("score-cam", "ss-cam", "is-cam", "ablation-cam"),
    ),
    Group(
        "Gradients of the input",
        "As fine as the image, and as noisy as gradients are. They need no layer, so any network will do that can be\n"
        "differentiated. Their zero, at which a path begins, is the mean colour.",
        ("input-x-gradient", "integrated-gradients", "smooth-grad", "gradient-shap"),
    ),
    Group(
        "Perturbation",
        "The network is a black box: parts of the image are hidden, and what happens is written down.",
        ("occlusion", "rise"),
    ),
    Group(
        "Transformers",
        "They read attention, so they need a network of global self-attention with a class token, such as ViT or DeiT.",
        ("raw-attention", "attention-rollout"),
    ),
    Group(
        "Controls",
        "Not explanations: they never look at the network, and a good metric must tell them from one.",
        ("fake-cam", "center-gaussian", "random"),
    ),
)

M = TypeVar("M")


def grouped(methods: Mapping[str, M]) -> Iterable[tuple[Group, list[M]]]:
    """Every group with those of its methods that there are; methods of no group come last."""
    listed = {name for group in GROUPS for name in group.names}
    more = Group("More", "", tuple(name for name in methods if name not in listed))
    for group in (*GROUPS, more):
        found = [methods[name] for name in group.names if name in methods]
        if found:
            yield group, found
