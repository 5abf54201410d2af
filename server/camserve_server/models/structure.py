"""Description of a network beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def structure(network: nn.Module) -> Sequence[str]:
    """Return texts that differ if the modules of two networks, or their configurations, differ.

    Two networks of Hugging Face whose configurations differ may have equal weights and modules.

    Args:
        network: Network.
    """
    configs: dict[int, Any] = {id(each.config): each.config for each in network.modules() if hasattr(each, "config")}
    texts = [str(each.to_json_string()) for each in configs.values() if hasattr(each, "to_json_string")]
    return [repr(network), *texts]
