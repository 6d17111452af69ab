"""Attention of single queries over paged latents in batched torch: every row's pages gathered, the rest masked away.

For devices that the C++ kernels do not serve. Shapes as in reference.py; L the slots of the longest table.
"""

import torch
from torch import Tensor


def latent_decode(
    q_BHX: Tensor, pages_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
) -> Tensor:
    """As `reference.latent_decode`, all rows at once: (B, H, C) in the dtype of q; softmax in float32."""
    slots_BLX = pages_PSX[table_BM.long()].flatten(1, 2)
    past_BL = torch.arange(slots_BLX.shape[1], device=q_BHX.device) >= lengths_B[:, None]
    # What lies past the end may be stale: its probability is 0, but 0 x NaN would still poison the sum.
    slots_BLX = slots_BLX.masked_fill_(past_BL[..., None], 0.0)
    scores_BHL = (q_BHX * scale) @ slots_BLX.transpose(1, 2)
    scores_BHL = scores_BHL.masked_fill(past_BL[:, None], float("-inf"))
    # torch's softmax is float32 inside whatever the dtype.
    return scores_BHL.softmax(dim=-1) @ slots_BLX[..., :latent]
