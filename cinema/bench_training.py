"""Measurement of a training step: folds and GoldenMem against one long sequence under dense masks.

Weights are random and nothing is learned: time and memory depend on shapes. Axes as in `transformer`.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cinema.bench_planner import random_flux, random_pairs, seconds_of
from cinema.budget import Work, flops
from cinema.config import KeyframeSettings
from cinema.goldenmem import PATCH, Layout
from cinema.progress import Progress, quiet
from cinema.transformer import InterleavedFluxTransformer, PairGroup

TURNS = 3  # timed runs of each form, interleaved


def bench_training(
    settings: KeyframeSettings,
    pairs: Sequence[int] = (8, 16, 32),
    width: int = 768,
    double: int = 4,
    single: int = 8,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Seconds and peak bytes of a forward and backward pass over windows of so many pairs, in three forms.

    `mask` is one sequence of whole pairs under dense masks, `fold` the same as folds, `goldenmem` the folds of the
    settings' levels with all pairs kept: levels take more than `memory_group` of them where the last would overflow.
    Peaks are what the allocator gives out above the weights and their gradients. Returns them by pairs and
    form, with `mask`'s time over each and its rate in TFLOP/s. UserError for a width that is no multiple of the
    heads', or less than one pair.
    """
    model = random_flux(width, double, single, pairs).train()
    rows: dict[str, Any] = {}
    for i, count in enumerate(pairs):
        on_progress(i, len(pairs), f"{count} pairs")
        rows |= _rows(model, settings, count)
    facts = {"width": width, "double": double, "single": single, "device": str(model.device), "mask": settings.mask}
    return facts | {"forms": rows}


def _rows(model: InterleavedFluxTransformer, settings: KeyframeSettings, count: int) -> dict[str, Any]:
    side, causal, text = settings.height // PATCH, settings.mask == "causal", settings.text_tokens
    group = max(settings.memory_group, -(-count // settings.memory_levels))
    golden = Layout(count, side, settings.memory_levels, group, settings.memory_ratio)
    whole, small = (random_pairs(model, layout, text) for layout in (Layout(count, side, 1, count), golden))
    forms: dict[str, Callable[[], list[Tensor]]] = {
        "mask": lambda: dense_pairs(model, whole, causal),
        "fold": lambda: model.forward_pairs(whole, causal),
        "goldenmem": lambda: model.forward_pairs(small, causal),
    }

    def step(name: str) -> None:
        torch.stack([out.float().square().mean() for out in forms[name]()]).sum().backward()

    took: list[dict[str, float]] = []
    for _ in range(TURNS + 1):  # the first warms up
        took.append({name: seconds_of(lambda: step(name)) for name in forms})  # noqa: B023
    seconds = {name: float(np.median([turn[name] for turn in took[1:]])) for name in forms}
    sides = {"mask": (side,) * count, "fold": (side,) * count, "goldenmem": golden.sides}
    return {
        f"{count} pairs, {name}": {
            "seconds": spent,
            "mask / it": seconds["mask"] / spent,
            "TFLOP/s": flops(model.config, sides[name], text, Work("full", causal=causal)) / spent / 1e12,
            "peak bytes": most_allocated(lambda: step(name), model.device),  # noqa: B023
        }
        for name, spent in seconds.items()
    }


def dense_pairs(
    model: InterleavedFluxTransformer, groups: list[PairGroup], causal: bool, guidance: float | None = None
) -> list[Float[Tensor, "b _s c"]]:
    """Velocities of all pairs by index, as `forward_pairs` gives them, from Flux's own blocks under dense masks.

    One sequence, all words and then all patches, runs through both kinds of block; modulation is per token. This is the
    form in which hybrid masking is written down (paper, section 3.1), and what the folds are tested against.
    """
    order = sorted((int(k), g, j) for g, group in enumerate(groups) for j, k in enumerate(group.index))
    words = [model.context_embedder(groups[g].text[:, j]) for _, g, j in order]  # b t d
    patches = [model.x_embedder(groups[g].latents[:, j]) for _, g, j in order]  # b s d
    tembs = [model.condition(group, guidance) for group in groups]
    rows = torch.stack([tembs[g][:, j] for _, g, j in order], dim=1)  # b p d
    t, s = [x.shape[1] for x in words], [x.shape[1] for x in patches]
    own_t, own_s = (torch.arange(len(t)).repeat_interleave(torch.tensor(x)).to(rows.device) for x in (t, s))
    owner = torch.cat([own_t, own_s])  # the pair of every token
    at = torch.cat([torch.zeros(sum(t), 2), *(groups[g].ids.cpu() for _, g, _ in order)]).to(rows.device)
    rope = model.pos_embed(torch.cat([torch.tensor([k for k, _, _ in order]).to(owner)[owner, None], at], dim=1))
    double, single, norm_out = cast(Any, (model.transformer_blocks, model.single_transformer_blocks, model.norm_out))
    local, wide = owner[:, None] == owner, (owner[:, None] >= owner) | (not causal)
    y, x = torch.cat(words, dim=1), torch.cat(patches, dim=1)
    for block in double:
        m = block.norm1.linear(block.norm1.silu(rows))[:, own_s].chunk(6, -1)  # shift, scale, gate: attention, MLP
        n = block.norm1_context.linear(block.norm1_context.silu(rows))[:, own_t].chunk(6, -1)
        h, e = block.norm1.norm(x) * (1 + m[1]) + m[0], block.norm1_context.norm(y) * (1 + n[1]) + n[0]
        h, e = block.attn(hidden_states=h, encoder_hidden_states=e, image_rotary_emb=rope, attention_mask=local)
        x, y = x + m[2] * h, y + n[2] * e
        x = x + m[5] * block.ff(block.norm2(x) * (1 + m[4]) + m[3])
        y = y + n[5] * block.ff_context(block.norm2_context(y) * (1 + n[4]) + n[3])
    x = torch.cat([y, x], dim=1)
    for block in single:
        shift, scale, gate = block.norm.linear(block.norm.silu(rows))[:, owner].chunk(3, -1)
        h = block.norm.norm(x) * (1 + scale) + shift
        out = block.attn(hidden_states=h, image_rotary_emb=rope, attention_mask=wide)
        x = x + gate * block.proj_out(torch.cat([out, block.act_mlp(block.proj_mlp(h))], dim=2))
    scale, shift = norm_out.linear(norm_out.silu(rows))[:, own_s].chunk(2, -1)
    return [*model.proj_out(norm_out.norm(x[:, sum(t) :]) * (1 + scale) + shift).split(s, dim=1)]


def most_allocated(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that are given out on a device at most while something runs, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    given = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
    return int(given.max(initial=0))
