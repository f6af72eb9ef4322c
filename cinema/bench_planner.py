"""Measurements of the keyframe model: the next keyframe with GoldenMem and a cache, and a step of training by folds.

Weights are random; nothing is drawn or learned: time depends on shapes, not on what weights know. Axes as in
`transformer`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cinema.budget import Work, flops
from cinema.config import KeyframeSettings
from cinema.errors import UserError
from cinema.flow import euler, schedule
from cinema.goldenmem import PATCH, Layout, coordinates, tokens
from cinema.progress import Progress, quiet
from cinema.training.keyframes import small_flux
from cinema.transformer import InterleavedFluxTransformer, PairGroup

HEAD = 64  # width of a head
TURNS = 3  # timed runs of each form, interleaved


def bench_planner(
    settings: KeyframeSettings,
    pairs: Sequence[int] = (8, 32, 48),
    width: int = 768,
    double: int = 4,
    single: int = 8,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Seconds to denoise keyframe number `pairs` of a film, by a random transformer of this width and depth.

    `naive` has all earlier keyframes whole, and runs all of them in every step; `planned` has what GoldenMem's layout
    keeps, runs it once, and then the newest pair against the cache. Steps, shapes and the memory are the settings'.
    Also returns their ratios, and what the last of `pairs` costs compared with the first. UserError for a width that is
    no multiple of the heads', or less than one pair.
    """
    model = random_flux(width, double, single, pairs)
    seconds: dict[str, dict[str, float]] = {"naive": {}, "planned": {}}
    _draw(model, settings, 2, naive=False)  # warms up
    for i, (count, name) in enumerate(product(pairs, seconds)):
        on_progress(i, 2 * len(pairs), f"keyframe {count}, {name}")
        seconds[name][str(count)] = seconds_of(lambda: _draw(model, settings, count, name == "naive"))  # noqa: B023
    ratios = {count: spent / seconds["planned"][count] for count, spent in seconds["naive"].items()}
    first, last = (seconds["planned"][str(count)] for count in (pairs[0], pairs[-1]))
    facts = {"width": width, "double": double, "single": single, "steps": settings.steps, "device": str(model.device)}
    return facts | {"seconds": seconds, "naive / planned": ratios, f"planned, {pairs[-1]} / {pairs[0]}": last / first}


@torch.inference_mode()
def _draw(model: InterleavedFluxTransformer, settings: KeyframeSettings, pairs: int, naive: bool) -> Tensor:
    """Denoise the last of so many random pairs."""
    side, text = settings.height // PATCH, settings.text_tokens
    levels = (1, pairs, 2.0) if naive else (settings.memory_levels, settings.memory_group, settings.memory_ratio)
    layout = Layout(min(pairs, levels[0] * levels[1]), side, *levels)
    last = layout.pairs - 1
    context, (newest,) = (random_pairs(model, layout, text, own) for own in (range(last), [last]))
    cache = model.encode_context(context) if context and not naive else None

    def velocity(x: Tensor, sigma: float) -> Tensor:
        now = replace(newest, latents=x[None].to(model.dtype), sigma=torch.full_like(newest.sigma, sigma))
        return model.forward_pairs([*context, now] if naive else [now], causal=True, cache=cache)[-1][0].float()

    return euler(velocity, newest.latents[0].float(), schedule(settings.steps, settings.shift))


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


def check_shape(width: int, pairs: Sequence[int]) -> None:
    """UserError for a width that is no multiple of the heads', or a number of pairs below 1."""
    if width % HEAD or width < HEAD or min(pairs, default=0) < 1:
        raise UserError(f"a width of {width} and {list(pairs)} pairs: give a multiple of {HEAD}, and 1 pair or more")


def random_flux(width: int, double: int, single: int, pairs: Sequence[int]) -> InterleavedFluxTransformer:
    """A random transformer in bfloat16, on a GPU if there is one; UserError as for `check_shape`."""
    check_shape(width, pairs)
    torch.manual_seed(0)
    model = small_flux(double, single, width // HEAD, HEAD, width).bfloat16().eval()
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def random_pairs(
    model: InterleavedFluxTransformer, layout: Layout, text: int, index: Sequence[int] | None = None
) -> list[PairGroup]:
    """Random pairs of a layout, a group per level, with `text` tokens each; only those of `index`, if it is given."""
    groups, width = [], model.config["joint_attention_dim"]
    for side, places in layout.by_level():
        if own := [i for i in places if index is None or i in index]:
            shapes = (tokens(side), 64), (text, width), (width,)
            x, y, z = (torch.randn(1, len(own), *shape, device=model.device, dtype=model.dtype) for shape in shapes)
            sigma, ids = torch.full((1, len(own)), 0.05), coordinates(side, layout.side)
            groups.append(PairGroup(x, y, z, sigma.to(x.device), ids.to(x.device), torch.tensor(own)))
    return groups


def seconds_of(run: Callable[[], object]) -> float:
    """How long something takes, on a GPU as well."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
