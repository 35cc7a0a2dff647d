"""Who sees whom: the specification that training, prefill, decode and the cache are tested against.

Key j is visible to query i while 0 <= i - j <= w.  Further back it is visible if it was not evicted; in
training it carries the bias beta_j = log(1 - alpha) instead (paper section 3.2).  The decision about token j is
read from token j + lag (lag 1: delayed eviction; lag w: immediate); tokens at the end of a document have none.
Segments are documents packed into one row; padding is segment -1.
"""

import torch
from torch import Tensor


def align_decisions(per_token: Tensor, lag: int, segment_ids: Tensor | None, fill: float | bool) -> Tensor:
    """Move what token j + lag says about token j to place j; ``fill`` where a document has no such token.

    per_token (B, H, T), segment_ids (B, T) or None; returns (B, H, T).
    """
    if lag == 0:
        return per_token
    moved = torch.full_like(per_token, fill)
    moved[..., :-lag] = per_token[..., lag:]
    if segment_ids is not None:
        decided = segment_ids[:, :-lag] == segment_ids[:, lag:]  # (B, T - lag)
        moved[..., :-lag] = torch.where(decided[:, None], moved[..., :-lag], fill)
    return moved


def visible(evicted: Tensor, window: int, segment_ids: Tensor | None = None) -> Tensor:
    """Boolean (B, H, T, T): does query i see key j?  evicted (B, H, T): decisions at the token they are about."""
    position = torch.arange(evicted.shape[-1], device=evicted.device)
    behind = position[:, None] - position[None, :]
    seen = (behind >= 0) & ((behind <= window) | ~evicted[:, :, None, :])
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return seen
