"""Ablations: one change of the memory at a time, judged where memory matters.

A film comes back to an early scene after others. Its shots up to there are as the toy world draws them; what comes
after the return is planned. A reader tells whether who comes back looks as before, and the picture is compared with
the toy world's own. All rows plan the same films from the same noise.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import accumulate, combinations_with_replacement, pairwise
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from cinema.config import PHI, KeyframeSettings, Preset
from cinema.errors import UserError
from cinema.evaluation import Rows, bootstrap, psnr, score_keyframes, share
from cinema.files import write_json
from cinema.flow import velocity
from cinema.goldenmem import PATCH, Layout, levels, tokens
from cinema.keyframes import KeyframePlanner, Remembered, encode_frames, rename, seeded, to_tensor
from cinema.movie import weights_identity
from cinema.progress import Progress, quiet
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, sample_flashback
from cinema.training import make_task
from cinema.training.autoencoder import save_sheet
from cinema.training.config import Stage, TrainConfig
from cinema.training.keyframes import PARTS
from cinema.training.loop import run_training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PICTURES = 6  # films of which a row's picture has the first shot after the return
SHOTS = 5  # of a scene; there are three, and the return
SIGMA = 0.85  # noise at which the error of a ratio is measured: where looks are decided
BUDGET = 1.5  # the ratio whose memory a learned one may not exceed
LEARNED = "learned"
MOVIES = 400  # that weights are trained on
TRAINED = "trained"  # of a row: options, and stages, with which weights are trained, for `tune` steps in all
FRESH = "fresh"  # of these: weights from nothing, not the preset's
RATES = "rates"  # of these: another optimiser
FEW = 40  # movies that a model overfits to
SINGLE, FOUR = {"batch": 24, "pairs": 1}, {"batch": 8, "pairs": 4}
EIGHT, LONG = {"batch": 4, "pairs": 8, "group": 4}, {"batch": 4, "pairs": 12, "group": 4}
FIGURES = ("identity", "psnr")
UNTOLD = "untold"  # of a row: captions tell no looks, as if they had been told before the film began

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "retrieval": {x: {"retrieval": x, "memory_levels": 2} for x in ("recency", "random", "t5", "clip", "oracle")},
    "ratio": {
        name: {"memory_ratio": ratio, "memory_levels": 4}
        for name, ratio in {"golden": PHI, "1.5": 1.5, "2": 2.0, LEARNED: LEARNED}.items()
    },
    "group": {str(count): {"memory_group": count} for count in (4, 1, 2, 8)},
    "levels": {str(count): {"memory_levels": count} for count in (4, 3, 2, 1)},
    "rope": {"same extent": {"memory_extent": True}, "raw": {"memory_extent": False}},
    "words": {"looks told": {}, "looks untold": {UNTOLD: True}, "looks told, pictures noise": {"context_sigma": 1.0}},
    "sigma": {
        str(sigma): {"context_sigma": sigma, "retrieval": "clip", "memory_levels": 2, UNTOLD: True}
        for sigma in (0.05, 0.001, 0.25, 0.5, 0.75, 1.0)
    },
    "mask": {
        f"{trained}, {mask}, {n} together": {"mask": mask, "window": n, TRAINED: {"memory": {"mask": trained}}}
        for trained in ("causal", "full")
        for mask, n in (("causal", 1), ("full", 1), ("causal", SHOTS), ("full", SHOTS))
    },
    "stages": {
        "1, 4, 8, 12 pairs": {TRAINED: {FRESH: True, "stages": [(0.25, x) for x in (SINGLE, FOUR, EIGHT, LONG)]}},
        "12 at once": {TRAINED: {FRESH: True, "stages": [(1.0, LONG)]}},
    }
    | {
        f"1 for {share:.0%}, then 12": {TRAINED: {FRESH: True, "stages": [(share, SINGLE), (1 - share, LONG)]}}
        for share in (0.25, 0.5, 0.75)
    },
    "optimizer": {
        name: {TRAINED: {FRESH: True, "stages": [(0.4, SINGLE), (0.6, FOUR)], RATES: rates}}
        for name, rates in {
            "Muon for matrices": {},
            "AdamW": {"muon_lr": None},
            "AdamW in 8 bits": {"muon_lr": None, "optimizer": "adamw8bit"},
        }.items()
    },
    "stride": {f"steps of 1 to {n}": {TRAINED: {"stride": n, "movies": FEW}} for n in (3, 1)},
    "noise": {
        name: {TRAINED: {"stages": [(1.0, FOUR | {"shared_noise": shared})]}}
        for name, shared in {"each its own": False, "one for all": True}.items()
    },
    "context": {f"to {sigma}": {TRAINED: {"context_sigma": sigma}} for sigma in (0.25, 0.001, 0.5, 0.75, 1.0)},
}  #: by name: rows, and what each changes, most of it settings of the planner; gains are over the first
SCENES = ("mask",)  # ablations that plan all shots after the return; the others plan one


def ablate(
    preset: Preset,
    name: str,
    stories: int = 50,
    seeds: Sequence[int] = (0, 1),
    out: Path | None = None,
    tune: int = 200,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Every row of an ablation, over so many films of each seed.

    Rows that differ in training train for `tune` steps, once for each seed. Returns, by row: `identity`, the share of
    appearances with colour, shape and hat right; `psnr`, nearness to the toy world's own picture in dB; of both the
    95 % interval over films (`ci95`), that of what they are above the first row's (`gain ci95`) and the values by seed;
    the `sides` of the levels in patches, and image `tokens` remembered. With a folder `out` what is done is kept there
    and not done again, and for every row and seed a picture: what some films show after the return, and below it what
    was planned. UserError if there is no such ablation.
    """
    if name not in ABLATIONS:
        raise UserError(f"there is no ablation {name!r}; choose one of {', '.join(ABLATIONS)}")
    parts: dict[str, list[dict[str, Any]]] = {label: [] for label in ABLATIONS[name]}
    jobs = [(label, seed) for label in parts for seed in seeds]
    with TemporaryDirectory() as spare:
        folder = out or Path(spare)
        folder.mkdir(parents=True, exist_ok=True)
        for i, (label, seed) in enumerate(jobs):

            def tell(done: int, total: int, what: str, i: int = i, label: str = label) -> None:
                on_progress(round(1000 * (i + done / total)), 1000 * len(jobs), f"{name} {label}: {what}")

            chosen, changes = preset, dict(ABLATIONS[name][label])
            if trained := changes.pop(TRAINED, None):
                chosen = preset.remembering(weights=_tuned(preset, trained, tune, seed, folder, tell))
            path, shots = folder / f"{name}-{label}-{seed}.json", SHOTS if name in SCENES else 1
            parts[label].append(_kept(path, chosen, changes, stories, seed, shots, tell))
    table, first = dict[str, Any](), next(iter(parts.values()))
    for label, own in parts.items():
        table[label] = {fact: own[0][fact] for fact in ("sides", "tokens")}
        table[label] |= {figure: _compare(*([part[figure] for part in x] for x in (own, first))) for figure in FIGURES}
    return {"ablation": name, "preset": preset.name, "stories": stories, "seeds": [*seeds], "rows": table}


def _compare(by_seed: Sequence[Rows], first: Sequence[Rows]) -> dict[str, Any]:
    """A figure of a row of a table, given for the films of each seed, and how much it is above the first row's."""
    films, others = ([film for part in x for film in part] for x in (by_seed, first))
    told = {"mean": share(films), "ci95": bootstrap(films), "gain ci95": bootstrap(films, others)}
    return told | {"by seed": [share(part) for part in by_seed]}


@cache
def learn_ratio(preset: Preset, films: int = 24, seed: int = 0) -> tuple[float, ...]:
    """Ratios, one for each step, whose levels leave the smallest error of the next keyframe's velocity.

    All levels are tried that cost no more than those of ratio 1.5, on training films that come back to a scene; a level
    may be as large as the one before it.
    """
    side, count = preset.keyframes.height // PATCH, preset.keyframes.memory_levels
    room = sum(map(tokens, levels(side, count, BUDGET)))
    fits = [
        (side, *reversed(rest))
        for rest in combinations_with_replacement(range(1, side + 1), count - 1)
        if tokens(side) + sum(map(tokens, rest)) <= room
    ]
    best = [c for c in fits if not any(c != d and all(x <= y for x, y in zip(c, d, strict=True)) for d in fits)]
    ratios = [tuple(a / b for a, b in pairwise(c)) for c in best]
    errors = [_error(_changed(preset, {"memory_ratio": ratio, "guidance": 1.0}), films, seed) for ratio in ratios]
    return ratios[errors.index(min(errors))]


def _changed(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    if changes.get("memory_ratio") == LEARNED:
        changes = {**changes, "memory_ratio": learn_ratio(_changed(preset, {**changes, "memory_ratio": BUDGET}))}
    return preset.remembering(**changes)


def _tuned(preset: Preset, trained: dict[str, Any], steps: int, seed: int, out: Path, tell: Progress) -> str:
    """Folder of weights after so many steps with these options and stages, from the preset's or from nothing."""
    base, told = preset.keyframes.weights, dict(trained)
    shares, kinds = zip(*told.pop("stages", [(1.0, LONG)]), strict=True)
    ends = [round(steps * end) for end in accumulate(shares, initial=0.0)]
    stages = [Stage(steps=b - a, **own) for (a, b), own in zip(pairwise(ends), kinds, strict=True)]
    movies = min(MOVIES, steps * FOUR["batch"])  # encoded before the first step, more than steps draw for nothing
    options = {"preset": preset.name, "cache": str(out / "cache"), "movies": movies, "shots": 24, "shift": 3.0}
    rates = {"init": base, "lr": 2e-4, "muon_lr": 3e-3}
    if told.pop(FRESH, False):
        rates = {"init": None, "lr": 8e-4, "muon_lr": 1.2e-2}
        options |= {part: str(Path(base) / folder) for part, folder in PARTS.items()} | {"recall": 0.1}
    rates |= told.pop(RATES, {})
    rest: dict[str, Any] = {"options": options | told, "stages": stages, "warmup": 20} | rates
    config = TrainConfig(task="keyframes", seed=seed, **rest)
    unsaid: Any = {"init": True, "options": {"cache", *PARTS}}
    recipe = weights_identity(base) + str(config.init is None) + config.model_dump_json(exclude=unsaid)
    folder = out / f"trained-{hashlib.blake2b(recipe.encode(), digest_size=6).hexdigest()}"
    if not (folder / "weights" / "model_index.json").is_file():
        run_training(config, make_task(config.task, seed, config.init, config.options), folder, True, tell)
    return str(folder / "weights")


def _kept(path: Path, preset: Preset, changes: dict[str, Any], *rest: Any) -> dict[str, Any]:
    """What `_judge` gives, or what a file beside says that it gave for the same settings and weights, by any name."""
    untold = changes.pop(UNTOLD, False)
    chosen = _changed(preset, changes)
    settings = asdict(chosen.keyframes)
    settings |= {name: weights_identity(settings[name]) for name in ("weights", "towers")}
    request = json.loads(json.dumps([settings, preset.dtype, untold, *rest[:-1]]))
    for kept in (path, *path.parent.glob("*.json")):  # rows of other ablations may be the same
        if kept.is_file() and (told := json.loads(kept.read_text(encoding="utf-8"))).get("request") == request:
            if kept != path:
                copy(kept.with_suffix(".png"), path.with_suffix(".png"))
                write_json(path, told)
            return told["result"]
    result = _judge(chosen, untold, *rest)
    save_sheet(path.with_suffix(".png"), (sheet := result.pop("pictures")), len(sheet) // 2)
    write_json(path, {"request": request, "result": result})
    return result


def _judge(chosen: Preset, untold: bool, stories: int, seed: int, shots: int, tell: Progress) -> dict[str, Any]:
    """Per film, of so many shots after the return: whether each who comes back is as before, and nearness in dB."""
    planner, told, shown = (
        KeyframePlanner.from_preset(chosen, DEVICE),
        dict[str, Any](identity=[], psnr=[]),
        list[list[Image.Image]]([[], []]),
    )
    for i in range(stories):
        movie, known = _return(f"heldout/{seed}/{i}", shots, chosen.keyframes)
        story, captions = movie.story(movie.cast if untold else ()), movie.captions()
        planned = planner.plan(story, 10_000 * seed + i, None, known)
        images = [None if k.index in known else k.image for k in planned]
        told["identity"].append(score_keyframes(captions, images).identity)
        new = [k.image for k in planned[len(known) :]]
        real = [render(movie, shot, chosen.keyframes.height) for shot in movie.shots[len(known) :]]
        told["psnr"].append([psnr(*pair) for pair in zip(new, real, strict=True)])
        if i < PICTURES:
            shown[0].append(real[0])
            shown[1].append(new[0])
        tell(i + 1, stories, f"film {i + 1} of {stories}")
    kept = planned[len(known)].remembered
    sides = levels(planner.side, chosen.keyframes.memory_levels, chosen.keyframes.memory_ratio)
    pictures = torch.cat([to_tensor(image) for row in shown for image in row])
    return {**told, "sides": [*sides], "tokens": sum(tokens(side) for _, side in kept), "pictures": pictures}


@torch.no_grad()
def _error(preset: Preset, films: int, seed: int) -> float:
    """Mean squared error of the velocity, of the first keyframe after the return, remembering the newest."""
    planner, settings, total = KeyframePlanner.from_preset(preset, DEVICE), preset.keyframes, 0.0
    for i in range(films):
        movie, known = _return(f"train/{seed}/{i}", 1, settings)
        captions = rename(movie.story(), planner.tags)
        memory = [Remembered(planner, j, image, captions[j]) for j, image in known.items()]
        levels = settings.memory_levels, settings.memory_group, settings.memory_ratio
        layout, generator = Layout(len(captions), planner.side, *levels), seeded(seed, i)
        data = encode_frames(planner.vae, to_tensor(render(movie, movie.shots[-1], settings.height)))
        noise = torch.randn(data.shape, generator=generator).to(data.device)
        field = planner.velocity_field(captions[-1:], memory, layout, generator)
        total += (field(torch.lerp(data, noise, SIGMA), SIGMA) - velocity(data, noise)).square().mean().item()
    return total / films


def _return(seed: str, shots: int, settings: KeyframeSettings) -> tuple[Movie, dict[int, Image.Image]]:
    """A film up to so many shots after its return, and what the shots before it show."""
    movie = sample_flashback(seed, shots=SHOTS)
    back = len(movie.shots) - SHOTS
    known = {i: render(movie, shot, settings.height) for i, shot in enumerate(movie.shots[:back])}
    return replace(movie, shots=movie.shots[: back + shots]), known
