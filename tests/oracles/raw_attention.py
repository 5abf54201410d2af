"""Raw attention: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale.

Alexey Dosovitskiy, Lucas Beyer, Alexander Kolesnikov, Dirk Weissenborn, Xiaohua Zhai, Thomas Unterthiner, Mostafa
Dehghani, Matthias Minderer, Georg Heigold, Sylvain Gelly, Jakob Uszkoreit, Neil Houlsby, 2020, arXiv:2010.11929. In
arXiv:2012.09838, it is a baseline of this name.

captum, torchcam and grad-cam do not have this method.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def raw_attention(attentions: Sequence[Tensor], grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Return the map [h, w] ≥ 0 of the attentions [heads, L, L] of all blocks, whose rows add up to 1.

    The first `prefix` tokens are not patches. The class token is the first of them. The patches follow in row-major
    order.
    """
    last = attentions[-1]
    row = torch.zeros_like(last[0, 0])
    for head in last:
        row = row + head[0] / len(last)
    return row[prefix:].reshape(grid)
