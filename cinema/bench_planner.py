"""Measurements of the keyframe planner: what its retrieval finds, what the next keyframe costs, and a training step.

Where time is measured weights are random: it depends on shapes, not on what weights know. Axes as in `transformer`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cinema.budget import Work, flops
from cinema.config import TOY, KeyframeSettings, Preset
from cinema.evaluation import bootstrap
from cinema.flow import euler, schedule
from cinema.goldenmem import PATCH, Layout, coordinates, tokens
from cinema.keyframes import KeyframePlanner, make_retriever
from cinema.progress import Progress, quiet
from cinema.retrieval import DEPTHS, RETRIEVALS, Index, Moment, coverage, describe, relevant
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_flashback
from cinema.training.config import TrainConfig
from cinema.training.keyframes import PARTS, KeyframeTask, small_flux
from cinema.training.loop import batches_of, one_step, start_run
from cinema.transformer import InterleavedFluxTransformer, PairGroup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Shape = tuple[int, int, int]  # of a random transformer: its width, its double-stream and its single-stream blocks
SHAPE = (768, 4, 8)
HEAD = 64  # width of a head
TURNS = 3  # timed runs of each form, interleaved
WARM = 2  # steps of training before the clock starts
FILMS = 2  # that they read
SQUARE = 4096 if DEVICE == "cuda" else 2048  # side of the matrices whose product is this machine's peak


def bench_retrieval(
    preset: Preset, stories: int, seed: int = 0, frames: int = 300_000, on_progress: Progress = quiet
) -> dict[str, Any]:
    """Coverage of the frames that matter, by who retrieves, over flashbacks of the toy world; and the time of a search.

    Asked for are all shots after the return of every story. Returns `coverage` (name -> k -> mean over stories and its
    95 % interval) and `search`, of one query among so many random `frames` of width 512.
    """
    text, settings = KeyframePlanner.from_preset(preset).text, preset.keyframes
    found: dict[str, list[Any]] = {name: [] for name in RETRIEVALS}
    for i in range(stories):
        movie = sample_flashback(f"heldout/{seed}/{i}")
        story, pictures = movie.story(), [render(movie, shot, settings.height) for shot in movie.shots]
        for name, rows in found.items():
            retriever, covered = make_retriever(replace(settings, retrieval=name), text.states, seed=i), []
            for j, shot in enumerate(story.shots):
                query = Moment(shot, describe(story, shot.caption))
                if j >= len(story.shots) * 3 // 4:  # after the return
                    ranked, wanted = retriever.rank(query, DEPTHS[-1]), relevant(shot, story.shots[:j])
                    covered.append([coverage(ranked, wanted, k) for k in DEPTHS])
                retriever.add(replace(query, image=pictures[j]))
            rows.append(np.mean(covered, axis=0))
        on_progress(i + 1, stories, f"story {i + 1} of {stories}")
    figures: dict[str, Any] = {name: {} for name in found}
    for name, rows in found.items():
        for k, column in zip(DEPTHS, np.transpose(rows).tolist(), strict=True):
            figures[name][str(k)] = {"mean": float(np.mean(column)), "ci95": bootstrap([[x] for x in column])}
    return {"stories": stories, "seed": seed, "coverage": figures, "search": time_search(frames)}


def time_search(frames: int, width: int = 512) -> dict[str, Any]:
    """Milliseconds of a search among random vectors and of the bare matrix product, medians of ten runs."""
    index, generator = Index(width), torch.Generator().manual_seed(0)
    index.add(torch.randn(frames, width, generator=generator))
    query = torch.randn(width, generator=generator)
    kept, half = index.vectors, query.half()
    runs: dict[str, Callable[[], object]] = {"search": lambda: index.search(query, 16), "product": lambda: kept @ half}
    spent = {f"{name} ms": 1e3 * median([seconds_of(run) for _ in range(11)][1:]) for name, run in runs.items()}
    return {"frames": frames, **spent, "search / product": spent["search ms"] / spent["product ms"]}


def bench_planner(
    settings: KeyframeSettings, pairs: Sequence[int] = (8, 32, 48), shape: Shape = SHAPE, on_progress: Progress = quiet
) -> dict[str, Any]:
    """Seconds to denoise keyframe number `pairs` of a film, by a random transformer of this `shape`.

    `naive` has all earlier keyframes whole, and runs all of them in every step; `planned` has what GoldenMem's layout
    keeps, runs it once, and then the newest pair against the cache. Steps, shapes and the memory are the settings'.
    Also returns their ratios, and what the last of `pairs` costs compared with the first.
    """
    model = random_flux(shape)
    seconds: dict[str, dict[str, float]] = {"naive": {}, "planned": {}}
    _draw(model, settings, 2, naive=False)  # warms up
    for i, (count, name) in enumerate(product(pairs, seconds)):
        on_progress(i, 2 * len(pairs), f"keyframe {count}, {name}")
        seconds[name][str(count)] = seconds_of(partial(_draw, model, settings, count, name == "naive"))
    ratios = {count: spent / seconds["planned"][count] for count, spent in seconds["naive"].items()}
    first, last = (seconds["planned"][str(count)] for count in (pairs[0], pairs[-1]))
    figures = {"seconds": seconds, "naive / planned": ratios, f"planned, {pairs[-1]} / {pairs[0]}": last / first}
    return _shape(model) | {"steps": settings.steps, "device": str(model.device)} | figures


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
    settings: KeyframeSettings, pairs: Sequence[int] = (8, 16, 32), shape: Shape = SHAPE, on_progress: Progress = quiet
) -> dict[str, Any]:
    """Seconds and peak bytes of a forward and backward pass over windows of so many pairs, in three forms.

    `mask` is one sequence of whole pairs under dense masks, `fold` the same as folds, `goldenmem` the folds of the
    settings' levels with all pairs kept: levels take more than `memory_group` of them where the last would overflow.
    Peaks are what the allocator gives out above the weights and their gradients. Returns them by pairs and
    form, with `mask`'s time over each and its rate in TFLOP/s.
    """
    model = random_flux(shape).train()
    rows: dict[str, Any] = {}
    for i, count in enumerate(pairs):
        on_progress(i, len(pairs), f"{count} pairs")
        rows |= _rows(model, settings, count)
    return _shape(model) | {"device": str(model.device), "mask": settings.mask, "forms": rows}


def _rows(model: InterleavedFluxTransformer, settings: KeyframeSettings, count: int) -> dict[str, Any]:
    side, causal, text = settings.height // PATCH, settings.mask == "causal", settings.text_tokens
    golden = Layout(count, side, settings.memory_levels, _group(settings, count), settings.memory_ratio)
    whole, small = (random_pairs(model, layout, text) for layout in (Layout(count, side, 1, count), golden))
    forms: dict[str, Callable[[], list[Tensor]]] = {
        "mask": lambda: dense_pairs(model, whole, causal),
        "fold": lambda: model.forward_pairs(whole, causal),
        "goldenmem": lambda: model.forward_pairs(small, causal),
    }

    def step(name: str) -> None:
        torch.stack([out.float().square().mean() for out in forms[name]()]).sum().backward()

    took = [[seconds_of(partial(step, name)) for name in forms] for _ in range(TURNS + 1)]  # the first warms up
    seconds = dict(zip(forms, np.median(took[1:], axis=0).tolist(), strict=True))
    sides = {"mask": (side,) * count, "fold": (side,) * count, "goldenmem": golden.sides}
    return {
        f"{count} pairs, {name}": {
            "seconds": spent,
            "mask / it": seconds["mask"] / spent,
            "TFLOP/s": flops(model.config, sides[name], text, Work("full", causal=causal)) / spent / 1e12,
            "peak bytes": most_allocated(partial(step, name), model.device),
        }
        for name, spent in seconds.items()
    }


def bench_train(
    preset: Preset,
    pairs: Sequence[int] = (8,),
    shape: Shape = SHAPE,
    steps: int = 5,
    batch: int = 1,
    lora: int | None = None,
    recompute: bool = False,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Time, rate and memory of the loop's own optimiser steps on windows of so many pairs of toy films.

    Gives, by pairs: median `seconds` of a step, `pairs/s`, model `TFLOP/s` (what is computed again is not counted),
    their share of `peak TFLOP/s`, which a large bfloat16 matrix product reaches here, the share of time spent waiting
    for a batch, and on a GPU the peak bytes.
    """
    rows, a = dict[str, Any](), torch.randn(SQUARE, SQUARE, device=DEVICE, dtype=torch.bfloat16)
    peak = 2 * SQUARE**3 / min(seconds_of(lambda: a @ a) for _ in range(5)) / 1e12
    width, double, single = shape
    told = {"double": double, "single": single, "heads": width // HEAD, "head_dim": HEAD}
    parts: dict[str, Any] = {part: Path(TOY.keyframes.weights) / where for part, where in PARTS.items()}
    with TemporaryDirectory() as spare:
        for i, count in enumerate(pairs):
            on_progress(i, len(pairs), f"{count} pairs")
            stage = {"steps": WARM + steps, "batch": batch, "pairs": count, "group": _group(preset.keyframes, count)}
            task = KeyframeTask(
                0, None, **parts, cache=Path(spare), movies=FILMS, shots=max(pairs), preset=preset.name, shape=told,
                lora=lora, recompute=recompute,
            )  # fmt: skip
            config = TrainConfig.model_validate({"task": "keyframes", "stages": [stage], "muon_lr": None})
            rows[f"{count} pairs"] = _measure(task, config, Path(spare) / str(count), peak)
    facts = {"batch": batch, "lora": lora, "recompute": recompute, "preset": preset.name, "peak TFLOP/s": peak}
    return _shape(task.planner.transformer) | facts | {"rows": rows}


def _measure(task: KeyframeTask, config: TrainConfig, out: Path, peak: float) -> dict[str, float]:
    run, stage = start_run(config, task, out, resume=False), config.stages[0]
    waits, spent = list[float](), list[float]()
    with batches_of(run) as coming:
        for step in range(config.total_steps):
            if step == WARM and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            batch = next(coming)
            waits.append(time.perf_counter() - began)
            spent.append(waits[-1] + seconds_of(partial(one_step, run, stage, batch)))
            run.step += 1
    seconds, settings = median(spent[WARM:]), task.settings
    work = Work("lora" if task.lora else "full", causal=settings.mask == "causal", rank=task.lora or 1)
    sides = task.layout(stage, 0).sides
    rate = stage.batch * flops(task.planner.transformer.config, sides, settings.text_tokens, work) / seconds / 1e12
    row = {"seconds": seconds, "pairs/s": stage.batch * stage.pairs / seconds, "TFLOP/s": rate, "of peak": rate / peak}
    row["waiting for data"] = sum(waits[WARM:]) / sum(spent[WARM:])
    return row | ({"peak bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def _shape(model: InterleavedFluxTransformer) -> dict[str, int]:
    config = model.config
    return {"width": model.inner_dim, "double": config["num_layers"], "single": config["num_single_layers"]}


def _group(settings: KeyframeSettings, pairs: int) -> int:
    """Pairs of a level, more than usual where so many would not fit."""
    return max(settings.memory_group, -(-pairs // settings.memory_levels))


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


def random_flux(shape: Shape) -> InterleavedFluxTransformer:
    """A random transformer in bfloat16, on a GPU if there is one; its width is a multiple of the heads'."""
    width, double, single = shape
    torch.manual_seed(0)
    model = small_flux(double, single, width // HEAD, HEAD, width).bfloat16().eval()
    torch.nn.Module.to(model, DEVICE)
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
