"""Groups of methods, which determine the order of docs/methods.md and of the figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Group:
    """Group of similar methods.

    Attributes:
        title: Title of the group.
        text: Description of the group in Markdown.
        names: Names of the methods.
    """

    title: str
    text: str
    names: tuple[str, ...]


GROUPS = (
    Group(
        "Poly-CAM and Opti-CAM",
        "The main methods of camserve. Poly-CAM combines several layers into a fine map. Opti-CAM optimises its map\n"
        "([which iterate it returns](decisions/0006-the-last-iterate-of-opti-cam.md)).",
        ("poly-cam", "poly-cam+", "poly-cam-", "opti-cam"),
    ),
    Group(
        "Class activation maps from gradients and weights",
        "These methods need one pass or a few, so they suit interactive use. The map of one layer is as coarse as the\n"
        "layer. On the last layer of a network that ends in global average pooling and one linear layer, such as\n"
        "EfficientNet-Lite0, CAM, Grad-CAM, XGrad-CAM and HiRes-CAM give the same map except for negative parts.",
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
        "These methods need one layer, and one or more forward passes for each of its channels. They use no gradients.",
        ("score-cam", "ss-cam", "is-cam", "ablation-cam"),
    ),
    Group(
        "Gradients of the input",
        "These maps have the resolution of the image and the noise of gradients. They need no layer, so they work\n"
        "with any differentiable network. Integration paths begin at the mean colour.",
        ("input-x-gradient", "integrated-gradients", "smooth-grad", "gradient-shap"),
    ),
    Group(
        "Perturbation",
        "These methods hide parts of the image and record the change of the output. They need only forward passes.",
        ("occlusion", "rise"),
    ),
    Group(
        "Transformers",
        "These methods read attention weights, so they need a network with global self-attention and a class token,\n"
        "such as ViT or DeiT.",
        ("raw-attention", "attention-rollout"),
    ),
    Group(
        "Controls",
        "Controls explain nothing, because they do not use the network. A good metric gives them bad scores.",
        ("fake-cam", "center-gaussian", "random"),
    ),
)

M = TypeVar("M")


def grouped(methods: Mapping[str, M]) -> Iterable[tuple[Group, list[M]]]:
    """Sort methods into the groups.

    Args:
        methods: Methods by name.

    Yields:
        Each group that has methods, with these methods. Methods without a group come last.
    """
    listed = {name for group in GROUPS for name in group.names}
    more = Group("More", "", tuple(name for name in methods if name not in listed))
    for group in (*GROUPS, more):
        members = [methods[name] for name in group.names if name in methods]
        if members:
            yield group, members
