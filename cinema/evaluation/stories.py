"""Held-out stories of the toy world, planned and scored: shares of what is right, with intervals over stories.

The control remembers another story: who is still right in it, is so by chance."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from cinema.budget import table
from cinema.config import Preset
from cinema.errors import UserError
from cinema.evaluation.toy import ATTRIBUTES, Scores, score_keyframes
from cinema.files import write_json
from cinema.keyframes import KeyframePlanner, Pictures
from cinema.movie import weights_identity
from cinema.progress import Progress, quiet
from cinema.story import Story, read_text
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, sample_movie

RESAMPLES = 2_000  # of the bootstrap
Looks = Literal["train", "unseen", "all"]
STRESSED = ("identity", "attributes", "sets", "wrong_context_identity")  # what the stress test tells
Rows = Sequence[Sequence[bool | float]]  # judgements, or figures, of every story


def evaluate_stories(
    preset: Preset,
    stories: int,
    shots: int,
    seed: int = 0,
    looks: Looks = "train",
    given: int = 0,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Plan held-out stories and score them; and each story's last shot again, after another story's keyframes.

    The first `given` shots are as the toy world draws them, everybody appears in them, and no caption describes
    anybody: who comes later is known from pictures alone. Otherwise everything is planned, from descriptions. Of
    `looks`, "unseen" takes only those that training never showed.

    Gives shares of what is right: `attributes` (and `by_attribute`), `identity`, `together` (of it, in shots of several
    characters), `sets` (that come back as they were), `last_identity` (of who comes back in the last shot) and
    `wrong_context_identity` (of the same, by the control, which takes two stories), None where nothing was judged; with
    95 % intervals over stories in `ci95` and numbers of judgements in `counts`. Progress counts keyframes. UserError if
    the preset's weights cannot be loaded, or no shot is left to plan.
    """
    if given >= shots:
        raise UserError(f"{given} of {shots} shots are given, so there is nothing to plan; ask for more shots")
    planner = KeyframePlanner.from_preset(preset, "cuda" if torch.cuda.is_available() else "cpu")
    movies = _movies(f"heldout/{seed}", stories, shots, looks, given)
    height, told = preset.keyframes.height, [movie.story() for movie in movies]
    shown = [{i: render(movie, shot, height) for i, shot in enumerate(movie.shots[:given])} for movie in movies]
    done, controls = itertools.count(1), range(stories if stories > 1 else 0)

    def draw(story: Story, known: Pictures) -> list[Image.Image]:
        images = []
        for keyframe in planner.iterate(story, seed, None, known):
            images.append(keyframe.image)
            if keyframe.index not in known:
                on_progress(next(done), stories * (shots - given) + len(controls), story.title)
        return images

    asked = [movie.story(movie.cast if given else ()) for movie in movies]
    drawn = [draw(story, known) for story, known in zip(asked, shown, strict=True)]
    mixed = [draw(other_context(asked[i], asked[i - 1]), dict(enumerate(drawn[i - 1][:-1]))) for i in controls]
    scores = [_score(story, images[given:]) for story, images in zip(told, drawn, strict=True)]
    rows = {"attributes": [s.first for s in scores], "identity": [s.identity for s in scores]}
    rows |= {"together": [s.together for s in scores], "sets": [s.sets for s in scores]}
    for name, films in (("last_identity", drawn), ("wrong_context_identity", mixed)):
        rows[name] = [_score(story, images[-1:]).identity for story, images in zip(told, films, strict=False)]
    figures: dict[str, Any] = {"stories": stories, "shots": shots, "seed": seed, "preset": preset.name}
    figures |= {"looks": looks, "given": given}
    figures |= {name: share(own) for name, own in rows.items()}
    figures["by_attribute"] = {name: share([s.attributes[name] for s in scores]) for name in ATTRIBUTES}
    figures["ci95"] = {name: bootstrap(own) for name, own in rows.items()}
    return figures | {"counts": {name: sum(map(len, own)) for name, own in rows.items()}}


def stress(
    preset: Preset,
    pairs: Sequence[int] = (8, 16, 24, 32, 48),
    stories: int = 20,
    seed: int = 0,
    out: Path | None = None,
    on_progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """The stress test (paper, Table 2): longer and longer stories, remembered by GoldenMem and in full size.

    A row for every number of pairs and each memory: shares of `evaluate_stories` with their intervals, and `tflop`, of
    a step of the last keyframe's denoising over all that is remembered. Rows are kept in the file `out`, and those that
    are there already, of the same weights and settings, are not made again. UserError as `evaluate_stories`.
    """
    rows = list[dict[str, Any]]()
    kept = read_figures(out) if out and out.is_file() else []
    weights, total = weights_identity(preset.keyframes.weights), 2 * len(pairs)
    for count, memory in itertools.product(pairs, ("goldenmem", "full")):
        settings = {} if memory == "goldenmem" else {"memory_levels": 1, "memory_group": count}
        chosen, done, name = preset.remembering(**settings), len(rows), f"{count} pairs, {memory}"
        row: dict[str, Any] = {"pairs": count, "memory": memory, "stories": stories, "seed": seed, "weights": weights}
        row["tflop"] = table(chosen.keyframes, [count])[0].goldenmem_flops / 1e12
        told = repr(replace(chosen.keyframes, weights="", towers=weights_identity(chosen.keyframes.towers)))
        row["settings"] = hashlib.blake2b(told.encode(), digest_size=6).hexdigest()

        def tell(at: int, of: int, message: str, done: int = done, name: str = name) -> None:
            on_progress(done * 1000 + 1000 * at // of, total * 1000, f"{name}: {message}")

        same = (old for old in kept if isinstance(old, dict) and row.items() <= old.items())
        if not (found := next(same, None)):
            figures = evaluate_stories(chosen, stories, count, seed, on_progress=tell)
            found = row | {name: figures[name] for name in STRESSED}
            found["ci95"] = {name: figures["ci95"][name] for name in STRESSED}
        rows.append(found)
        if out:  # what was there stays until all is done
            write_json(out, rows + [old for old in kept if old not in rows])
    return rows


def _movies(seed: str, count: int, shots: int, looks: Looks, given: int) -> list[Movie]:
    """Held-out movies, of which everybody appears in the first `given` shots, if there are such."""
    every = (sample_movie(f"{seed}/{i}", shots, looks) for i in itertools.count())
    seen = (m for m in every if not given or {*m.cast} == {a.tag for s in m.shots[:given] for a in s.actors})
    return [*itertools.islice(seen, count)]


def other_context(story: Story, other: Story) -> Story:
    """The last shot of a story after all but the last of another's, as if that were what happened before."""
    cast, sets = {c.tag: c for c in [*other.cast, *story.cast]}, {p.name: p for p in [*other.sets, *story.sets]}
    shots = [*other.shots[:-1], story.shots[-1]]
    return Story(title=story.title, cast=[*cast.values()], sets=[*sets.values()], shots=shots)


def _score(story: Story, images: Sequence[Image.Image]) -> Scores:
    """Scores of the story's last shots, as many as there are pictures."""
    unseen = [None] * (len(story.shots) - len(images))
    return score_keyframes([shot.caption for shot in story.shots], [*unseen, *images])


def share(rows: Rows) -> float | None:
    """The mean of all judgements; None if nothing was judged."""
    return sum(map(sum, rows)) / number if (number := sum(map(len, rows))) else None


def bootstrap(rows: Rows, minus: Rows | None = None) -> list[float] | None:
    """95 % interval of the mean of all judgements, or of how much it is above that of `minus`, on the same stories.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13) that draws whole rows, stories, anew, as their
    judgements hang together. None if nothing was judged.
    """
    counts = np.array([[sum(a), len(a), sum(b), len(b)] for a, b in zip(rows, minus or rows, strict=True) if a], float)
    if not len(counts):
        return None
    draws = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    a, n, b, m = counts[draws].sum(1).T
    return np.quantile(a / n - (b / m if minus else 0), [0.025, 0.975]).tolist()


def read_figures(path: Path) -> Any:
    """Figures that `cinema evaluate --json` wrote; UserError if it cannot be read."""
    try:
        return json.loads(read_text(path, "figures in JSON"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); give a file that `cinema evaluate --json` wrote") from None


def fallen(now: Any, before: Any, name: str = "") -> list[str]:
    """What is worse than before by more than chance: figures below the lower end of the interval they had, or gone.

    Both are figures as `evaluate_stories`, `stress` or `evaluate_films` give them, or what JSON made of them.
    """
    if isinstance(before, list):
        parts = {f"{name}{i + 1} ": (now[i] if i < len(now) else {}, old) for i, old in enumerate(before)}
        return [line for at, pair in parts.items() for line in fallen(*pair, at)]
    if not before or not isinstance(before, dict):
        return []
    worse, means = list[str](), now.get("mean", now)
    for figure, interval in (before.get("ci95") or {}).items():
        if interval and ((new := means.get(figure)) is None or new < interval[0]):
            worse.append(f"{name}{figure} is {new if new is None else f'{new:.3f}'}, it was {interval[0]:.3f} or more")
    return worse
