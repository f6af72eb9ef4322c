"""Measurement of the planner: what the next keyframe costs with GoldenMem and a cache, and without either.

Weights are random and nothing is drawn: time depends on shapes, not on what weights know. Axes as in `transformer`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cinema.config import KeyframeSettings
from cinema.errors import UserError
from cinema.flow import euler, schedule
from cinema.goldenmem import PATCH, Layout, coordinates, tokens
from cinema.progress import Progress, quiet
from cinema.training.keyframes import small_flux
from cinema.transformer import InterleavedFluxTransformer, PairGroup

HEAD = 64  # width of a head


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
    if width % HEAD or width < HEAD or min(pairs, default=0) < 1:
        raise UserError(f"a width of {width} and {list(pairs)} pairs: give a multiple of {HEAD}, and 1 pair or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = small_flux(double, single, width // HEAD, HEAD, width).bfloat16().eval()
    torch.nn.Module.to(model, device)
    seconds: dict[str, dict[str, float]] = {"naive": {}, "planned": {}}
    total = 2 * len(pairs)
    with torch.inference_mode():
        _draw(model, settings, 2, naive=False)  # warms up
        for i, count in enumerate(pairs):
            for j, name in enumerate(seconds):
                on_progress(2 * i + j, total, f"keyframe {count}, {name}")
                seconds[name][str(count)] = _seconds(lambda: _draw(model, settings, count, name == "naive"))  # noqa: B023
    ratios = {count: spent / seconds["planned"][count] for count, spent in seconds["naive"].items()}
    first, last = (seconds["planned"][str(count)] for count in (pairs[0], pairs[-1]))
    facts = {"width": width, "double": double, "single": single, "steps": settings.steps, "device": device}
    return facts | {"seconds": seconds, "naive / planned": ratios, f"planned, {pairs[-1]} / {pairs[0]}": last / first}


def _draw(model: InterleavedFluxTransformer, settings: KeyframeSettings, pairs: int, naive: bool) -> Tensor:
    """Denoise the last of so many pairs."""
    side, room = settings.height // PATCH, settings.memory_levels * settings.memory_group
    kept = pairs if naive else min(pairs, room)
    levels = (1, pairs, 2.0) if naive else (settings.memory_levels, settings.memory_group, settings.memory_ratio)
    context = _groups(model, Layout(kept, side, *levels), settings.text_tokens)
    (newest,) = _groups(model, Layout(1, side, 1, 1), settings.text_tokens, first=kept)
    cache = None if naive or not context else model.encode_context(context)
    last = torch.tensor([kept])

    def velocity(x: Tensor, sigma: float) -> Tensor:
        now = PairGroup(x[None].to(model.dtype), newest.text, newest.pooled, newest.sigma * 0 + sigma, newest.ids, last)
        if cache is None and context:
            return model.forward_pairs([*context, now], causal=True)[-1][0].float()
        return model.forward_pairs([now], causal=True, cache=cache)[0][0].float()

    return euler(velocity, newest.latents[0].float(), schedule(settings.steps, settings.shift), None)


def _groups(model: InterleavedFluxTransformer, layout: Layout, text: int, first: int = 0) -> list[PairGroup]:
    """Random pairs, a group per level; without a `first` index, all of the layout but the newest."""
    groups, width = [], model.config["joint_attention_dim"]
    for side, places in layout.by_level():
        index = [first + i for i in places if first or i < layout.pairs - 1]
        if index:
            shapes = (tokens(side), 64), (text, width), (width,)
            x, y, z = (torch.randn(1, len(index), *shape, device=model.device, dtype=model.dtype) for shape in shapes)
            sigma = torch.full((1, len(index)), 0.05, device=model.device)
            ids = coordinates(side, max(layout.sides)).to(model.device)
            groups.append(PairGroup(x, y, z, sigma, ids, torch.tensor(index)))
    return groups


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
