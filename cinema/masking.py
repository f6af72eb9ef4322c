"""Hybrid attention masking (paper, section 3.1): who sees whom, a dense reference, and what production runs.

Local: a pair sees itself; global: every pair; causal: itself and earlier ones. Production builds no mask: local is a
fold into the batch, global plain attention, causal plain attention over key prefixes (block-sparse on CUDA).
Axes: `b` story, `k` head, `n` queries, `m` keys, `h` width of a head.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

SHORT = 600**2  # queries x keys up to which, training on a CPU, a plain softmax beats SDPA's backward


def pair_mask(lengths: Sequence[int], mode: Literal["local", "global", "causal"]) -> Bool[Tensor, "n n"]:
    """Who sees whom, token by token, of pairs with so many tokens: row i is True where query i sees the key.

    "local" is the paper's M_local = diag(M_1 ... M_P), "global" its M_global, "causal" the autoregressive form.
    """
    key = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    local = key[:, None] == key
    return {"local": local, "causal": key[:, None] >= key, "global": torch.ones_like(local)}[mode]


def attend_dense(
    q: Float[Tensor, "b k n h"], k: Float[Tensor, "b k n h"], v: Float[Tensor, "b k n h"], mask: Bool[Tensor, "n n"]
) -> Float[Tensor, "b k n h"]:
    """Reference: attention under a dense mask, spelled out. Quadratic memory; for tests and the book only."""
    scores = torch.einsum("bknh,bkmh->bknm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bknm,bkmh->bknh", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def attend_full(
    q: Float[Tensor, "b k n h"], k: Float[Tensor, "b k m h"], v: Float[Tensor, "b k m h"]
) -> Float[Tensor, "b k n h"]:
    """Every query sees every key: softmax(q kT / sqrt(h)) v, by whichever kernel is fastest here."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[2] * k.shape[2] <= SHORT:
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attend_causal(
    q: Float[Tensor, "b k n h"], k: Float[Tensor, "b k m h"], v: Float[Tensor, "b k m h"], lengths: Sequence[int]
) -> Float[Tensor, "b k n h"]:
    """Causal between pairs: pair i sees the pairs up to itself, and all of its own tokens.

    One plain attention per pair over a prefix of the keys; training on CUDA one flex_attention with a block
    mask instead, compiled at first use. Queries are those of the pairs, of so many tokens each; keys and values may
    begin with more that all of them see (a cache).
    """
    past = k.shape[2] - q.shape[2]
    if q.device.type == "cuda" and torch.is_grad_enabled() and len(lengths) > 1:
        return _flex()(q, k, v, block_mask=_block_mask(tuple(lengths), past, q.device))
    done, end = [], past
    for queries in q.split(list(lengths), dim=2):
        end += queries.shape[2]
        done.append(attend_full(queries, k[:, :, :end], v[:, :, :end]))
    return torch.cat(done, dim=2)


@cache
def _flex() -> Any:
    return torch.compile(flex_attention)


@lru_cache(maxsize=64)
def _block_mask(lengths: tuple[int, ...], past: int, device: torch.device) -> Any:
    pair = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    keys = torch.cat([pair.new_full((past,), -1), pair])  # cached keys count as an earlier pair
    return create_block_mask(lambda b, k, i, j: pair[i] >= keys[j], None, None, len(pair), len(keys), str(device))
