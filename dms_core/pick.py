"""Which token comes next, and which one ends a chain."""

from collections.abc import Sequence

import torch
from torch import Tensor

HEAD = 1024  # tokens, of a vocabulary, that are sorted where these are enough


def stop_tokens(model, tokenizer) -> tuple[int, ...]:
    """The tokens that end a text, sorted: the tokenizer's <eos> and those at which ``model.generate`` stops."""
    theirs = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(theirs if isinstance(theirs, Sequence) else [theirs])]
    return tuple(sorted({int(token) for token in found if token is not None}))


def padding_token(model, tokenizer) -> int:
    """A token id to fill rows with: the tokenizer's, or <eos> or 0 where the model knows none, since it is masked."""
    known = range(model.config.get_text_config().vocab_size)
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token in known), 0)


def pick_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int | None = None, min_p: float = 0.0
) -> Tensor:
    """One token a row by inverse CDF over what temperature, top-k, top-p and min-p leave, in transformers' order.

    logits (S, V), uniforms (S,) in [0, 1); returns (S,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, token = _likeliest((logits.float() / temperature).softmax(-1), top_p, top_k, min_p)
    nucleus: float | Tensor = top_p
    if top_k is not None:  # equals of the last one stay
        p = torch.where(p >= p[:, min(top_k, p.shape[1]) - 1, None], p, 0.0)
        nucleus = top_p * p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    p = torch.where(before < nucleus, p, 0.0)
    if min_p:
        p = torch.where(p >= min_p * p[:, :1], p, 0.0)
    cdf = p.cumsum(-1)
    chosen = (cdf <= uniforms[:, None].to(cdf) * cdf[:, -1:]).sum(-1, keepdim=True)
    return token.gather(1, chosen.clamp_max((p > 0).sum(-1, keepdim=True) - 1))[:, 0]


def _likeliest(p: Tensor, top_p: float, top_k: int | None, min_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities p (S, V) in descending order, ties by token, and their tokens; may omit what cannot be drawn.

    On a CPU a large vocabulary is not sorted whole where all that may come is before the HEAD-th probability.
    """
    if p.device.type == "cpu" and p.shape[1] > HEAD:
        head, token = p.topk(HEAD)
        last = head[:, -1]
        if top_k is None:
            enough = torch.where(head > last[:, None], head, 0.0).sum(-1) >= top_p + 1e-5
            enough |= last < min_p * head[:, 0]
        else:  # with their equals, since the nucleus is a share of them all
            enough = last < head[:, min(top_k, HEAD) - 1]
        if bool(enough.all()):
            token = token.sort(-1).values
            head, order = p.gather(1, token).sort(dim=-1, descending=True, stable=True)
            return head, token.gather(1, order)
    return p.sort(dim=-1, descending=True, stable=True)
