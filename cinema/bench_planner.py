"""Measurement of the planner: what the next keyframe costs with GoldenMem and a cache, and without either.

Weights are random and nothing is drawn: time depends on shapes, not on what weights know. Axes as in `transformer`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
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


def random_flux(width: int, double: int, single: int, pairs: Sequence[int]) -> InterleavedFluxTransformer:
    """A random transformer in bfloat16, on a GPU if there is one.

    UserError for a width that is no multiple of the heads', or a number of `pairs` below 1.
    """
    if width % HEAD or width < HEAD or min(pairs, default=0) < 1:
        raise UserError(f"a width of {width} and {list(pairs)} pairs: give a multiple of {HEAD}, and 1 pair or more")
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
