"""Raw attention: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale.

Alexey Dosovitskiy, Lucas Beyer, Alexander Kolesnikov, Dirk Weissenborn, Xiaohua Zhai, Thomas Unterthiner, Mostafa
Dehghani, Matthias Minderer, Georg Heigold, Sylvain Gelly, Jakob Uszkoreit, Neil Houlsby, 2020, arXiv:2010.11929; as the
baseline of that name in arXiv:2012.09838.

None of captum, torchcam and grad-cam has it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def raw_attention(attentions: Sequence[Tensor], grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """attentions, one a block, each [heads, L, L], rows adding up to 1 → map of the grid (h, w), ≥ 0.

    The class token is the first of `prefix` tokens that are no patches; the patches follow, row by row.
    """
    last = attentions[-1]
    row = torch.zeros_like(last[0, 0])
    for head in last:
        row = row + head[0] / len(last)
    return row[prefix:].reshape(grid)
