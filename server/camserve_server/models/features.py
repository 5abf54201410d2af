"""Recognition of feature extractors: networks without a classifier, whose output is no score of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from camserve_server.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Ran:
    """End of a call of a module.

    Attributes:
        name: Name of the module.
        module: The module.
        dimensions: Number of dimensions of its output; 0 if it is no tensor.
        place: Address and number of the output's values.
    """

    name: str
    module: nn.Module
    dimensions: int
    place: tuple[int, int]

    @classmethod
    def of(cls, name: str, module: nn.Module, output: object) -> Ran:
        """Describe a call by its output."""
        if not isinstance(output, Tensor) or output.is_quantized:
            return cls(name, module, 0, (0, 0))
        return cls(name, module, output.ndim, (output.data_ptr(), output.numel()))


def check_classifier(module: nn.Module, ran: Sequence[Ran], y: Tensor, where: str) -> None:
    """Refuse a network whose output is features.

    Args:
        module: Network.
        ran: Modules that ran in a forward pass on one image, in the order of their ends.
        y: Outputs [N, classes] for different images.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The network has no classifier.
    """
    why = _why_features(module, ran, y)
    if why:
        raise ConfigError(
            f"{where}.source: the network has no classifier: {why}; add a classifier with trained weights in the "
            f"factory, or set classes = {y.shape[1]} if its {y.shape[1]} outputs are scores of classes"
        )


def _why_features(module: nn.Module, ran: Sequence[Ran], y: Tensor) -> str:
    """Return the reason why the output is features; empty if it is scores of classes, as far as one can tell."""
    lengths = y.norm(dim=1)
    if getattr(module, "num_classes", None) == 0:
        return "its attribute num_classes is 0"
    if len(y) > 1 and bool(((lengths - 1).abs() < 1e-4).all()) and bool((y < 0).any()):
        return "its outputs are vectors of length 1, as of embeddings"
    return _why_no_head(ran, y.shape[1]) if y.shape[1] > 1 else ""


def _why_no_head(ran: Sequence[Ran], classes: int) -> str:
    """Return the reason why the last modules compute no scores of so many classes; empty if they may."""
    weighted = [each for each in ran if any(True for _ in each.module.parameters(recurse=False))]
    containers = [each for each in weighted if _contains(each.module, weighted)]
    leaves = [each for each in weighted if each not in containers]
    last = leaves[-1] if leaves else None
    if last is None or any(_has_matrix(each.module, classes) for each in containers):
        return ""
    producers = [each for each in ran if each.place == ran[-1].place and not list(each.module.children())]
    if producers and isinstance(producers[-1].module, nn.Identity) and not _has_matrix(last.module, classes):
        return f"it ends in {producers[-1].name}, which is an Identity in the place of a classifier"
    # A norm of scores follows a linear module that returns one row for each image.
    normed_scores = len(leaves) > 1 and leaves[-2].dimensions == 2 and _has_matrix(leaves[-2].module, classes)
    ends = producers and producers[-1] is last and not normed_scores
    if _is_norm(last.module) and (last.dimensions > 2 or ends):
        return f"the last module with weights is {last.name}, a {type(last.module).__name__}"
    return ""


def _contains(module: nn.Module, others: Sequence[Ran]) -> bool:
    inner = set(module.modules()) - {module}
    return any(each.module in inner for each in others)


def _has_matrix(module: nn.Module, classes: int) -> bool:
    """Return True if the module has weights of a linear function with so many outputs."""
    weights = module.parameters(recurse=False)
    return any(classes in weight.shape[:2] and weight[0].numel() > 1 for weight in weights if weight.ndim in (2, 4))


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and all(
        torch.squeeze(weight).ndim == 1 for weight in module.parameters(recurse=False)
    )
