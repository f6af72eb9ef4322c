"""Scores on the toy world, where a reader recovers from pixels who is really there.

A look is described at its character's first appearance only: there it must be drawn as told (*attributes*), later it
must come back from memory (*identity*). The control remembers another story: who is still right, is so by chance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from cinema.config import Preset
from cinema.keyframes import KeyframePlanner, Pictures
from cinema.progress import Progress, quiet
from cinema.story import Story
from cinema.toyworld.draw import render
from cinema.toyworld.reader import read_clip, read_keyframe
from cinema.toyworld.world import Look, parse_caption, sample_flashback, sample_movie

ATTRIBUTES = ("colour", "shape", "hat", "set", "position", "size")
LOOK = ATTRIBUTES[:3]
RESAMPLES = 2_000  # of the bootstrap


@dataclass
class Scores:
    """Which of a story's claims its pictures keep; `attributes` are name → right or wrong, per first appearance."""

    attributes: dict[str, list[bool]] = field(default_factory=lambda: {name: [] for name in ATTRIBUTES})
    identity: list[bool] = field(default_factory=list)  #: colour, shape and hat all right, for later appearances

    @property
    def first(self) -> list[bool]:
        """All attributes of all first appearances."""
        return [right for name in ATTRIBUTES for right in self.attributes[name]]


@dataclass(frozen=True)
class ClipScores:
    """How a shot moves."""

    actions: list[bool]  #: for every character of the caption, whether its action is the captioned one
    camera: bool  #: whether the camera's move is
    psnr: float | None  #: of the first frame against the keyframe, in dB, at most 100; None without a keyframe


def score_keyframes(captions: Sequence[str], images: Sequence[Image.Image | None]) -> Scores:
    """Score a story's keyframes, of any size, against its captions, which say all that there is to know.

    None leaves a shot out. ValueError if a caption is not in the shot list's language or has no image.
    """
    scores, looks = Scores(), dict[str, Look]()
    for caption, image in zip(captions, images, strict=True):
        setup, described = parse_caption(caption)
        looks |= described
        if image is None:
            continue
        seen = read_keyframe(image, setup)
        for actor in setup.actors:
            found, look = seen.actor(actor.tag), looks.get(actor.tag)
            right = {n: found is not None and getattr(found.look, n) == getattr(look, n, None) for n in LOOK}
            if actor.tag not in described:
                scores.identity.append(all(right.values()))
                continue
            right |= {"set": seen.place == setup.place, "position": found is not None, "size": seen.size == setup.size}
            for name, judged in scores.attributes.items():
                judged.append(right[name])
    return scores


def score_clip(frames: Sequence[Image.Image], caption: str, keyframe: Image.Image | None = None) -> ClipScores:
    """Score the motion of a shot of 5 or more frames; who is seen in the first is the one who should act.

    ValueError: too few frames, a caption in another language than the shot list's, or a keyframe of another size.
    """
    setup, _ = parse_caption(caption)
    seen = read_keyframe(frames[0], setup)
    clip = read_clip(frames, setup, {a.tag: found.look for a in setup.actors if (found := seen.actor(a.tag))})
    right = [clip.actions.get(actor.tag) == actor.action for actor in setup.actors]
    return ClipScores(right, clip.camera == setup.camera, None if keyframe is None else psnr(frames[0], keyframe))


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB, 100 if they are equal; ValueError if their sizes differ."""
    if a.size != b.size:
        raise ValueError(f"pictures of {a.size} and {b.size} pixels cannot be compared")
    x, y = (np.asarray(image.convert("RGB"), np.float64) / 255 for image in (a, b))
    return float(min(100.0, -10 * np.log10(max(1e-10, np.square(x - y).mean()))))


def evaluate_stories(
    preset: Preset, stories: int, shots: int, seed: int = 0, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Plan held-out stories and score them; and each story's last shot again, after another story's keyframes.

    With one story there is no other, and no control; in one shot nobody can come back. Progress counts keyframes.
    UserError if the preset's weights cannot be loaded.

    Returns:
        Shares of what is right: `attributes` (and `by_attribute`), `identity`, `last_identity` (of characters who
        come back in the last shot), `wrong_context_identity` (of the same, by the control), with 95 % bootstrap
        intervals over stories in `ci95` and numbers of judgements in `counts`. None where nothing was judged.
    """
    planner = KeyframePlanner.from_preset(preset, "cuda" if torch.cuda.is_available() else "cpu")
    told = [sample_movie(f"heldout/{seed}/{i}", shots).story() for i in range(stories)]
    controls = range(stories if stories > 1 else 0)
    done, total = 0, stories * shots + len(controls)

    def draw(story: Story, known: Pictures, what: str) -> list[Image.Image]:
        nonlocal done
        images = []
        for keyframe in planner.iterate(story, seed, None, known):
            images.append(keyframe.image)
            done += keyframe.index not in known
            if on_progress:
                on_progress(done, total, what)
        return images

    drawn = [draw(story, {}, f"story {i + 1} of {stories}") for i, story in enumerate(told)]
    scores = [_score(story, images) for story, images in zip(told, drawn, strict=True)]
    judged = {"attributes": [s.first for s in scores], "identity": [s.identity for s in scores]}
    judged["last_identity"] = [_score(story, images[-1:]).identity for story, images in zip(told, drawn, strict=True)]
    judged["wrong_context_identity"] = wrong = []
    for i in controls:
        known = dict(enumerate(drawn[i - 1][:-1]))
        images = draw(other_context(told[i], told[i - 1]), known, f"control {i + 1} of {stories}")
        wrong.append(_score(told[i], images[-1:]).identity)
    figures: dict[str, Any] = {"stories": stories, "shots": shots, "seed": seed, "preset": preset.name}
    figures |= {name: _share(rows) for name, rows in judged.items()}
    figures["by_attribute"] = {name: _share([s.attributes[name] for s in scores]) for name in ATTRIBUTES}
    figures["ci95"] = {name: bootstrap(rows) for name, rows in judged.items()}
    return figures | {"counts": {name: sum(map(len, rows)) for name, rows in judged.items()}}


def evaluate_returns(
    preset: Preset, stories: int, retrievals: Sequence[str], seed: int = 0, on_progress: Progress = quiet
) -> dict[str, Any]:
    """Who is still right when a film comes back to an early scene, by who chooses what is remembered.

    Of every held-out flashback the first shot after the return is planned; what comes before is as the toy world draws
    it. Two GoldenMem levels are remembered, fewer shots than lie between. UserError as for `evaluate_stories`.

    Returns:
        `identity` by retrieval, `ci95` of it, and `gain ci95`: of how much it is above the first one's, whose stories
        are the same.
    """
    settings, rows, done = replace(preset.keyframes, memory_levels=2), dict[str, list[list[bool]]](), 0
    for name in retrievals:
        chosen = replace(preset, keyframes=replace(settings, retrieval=name))
        planner, rows[name] = KeyframePlanner.from_preset(chosen, "cuda" if torch.cuda.is_available() else "cpu"), []
        for i in range(stories):
            movie = sample_flashback(f"heldout/{seed}/{i}")
            back = len(movie.shots) - len(movie.shots) // 4  # of four scenes, the last
            known = {j: render(movie, shot, settings.height) for j, shot in enumerate(movie.shots[:back])}
            story = replace(movie, shots=movie.shots[: back + 1]).story()
            image = planner.plan(story, seed, None, known)[-1].image
            rows[name].append(_score(story, [image]).identity)
            done += 1
            on_progress(done, stories * len(retrievals), f"{name}, story {i + 1} of {stories}")
    first = rows[retrievals[0]]
    figures: dict[str, Any] = {"stories": stories, "seed": seed, "preset": preset.name}
    figures["identity"] = {name: _share(own) for name, own in rows.items()}
    figures["ci95"] = {name: bootstrap(own) for name, own in rows.items()}
    return figures | {"gain ci95": {name: paired(own, first) for name, own in rows.items() if own is not first}}


def other_context(story: Story, other: Story) -> Story:
    """The last shot of a story after all but the last of another's, as if that were what happened before."""
    cast = {c.tag: c for c in [*other.cast, *story.cast]}
    sets = {p.name: p for p in [*other.sets, *story.sets]}
    shots = [*other.shots[:-1], story.shots[-1]]
    return Story(title=story.title, cast=[*cast.values()], sets=[*sets.values()], shots=shots)


def _score(story: Story, images: Sequence[Image.Image]) -> Scores:
    """Scores of the story's last shots, as many as there are pictures."""
    unseen = [None] * (len(story.shots) - len(images))
    return score_keyframes([shot.caption for shot in story.shots], [*unseen, *images])


def _share(rows: list[list[bool]]) -> float | None:
    return sum(map(sum, rows)) / count if (count := sum(map(len, rows))) else None


def paired(a: Sequence[Sequence[bool]], b: Sequence[Sequence[bool]]) -> list[float]:
    """95 % interval of how much larger the share of True is in `a` than in `b`, whose rows are of the same stories."""
    counts = np.array([[sum(x), len(x), sum(y), len(y)] for x, y in zip(a, b, strict=True)], float)
    return interval(counts, lambda drawn: drawn[0] / drawn[1] - drawn[2] / drawn[3])


def bootstrap(rows: Sequence[Sequence[bool]]) -> list[float] | None:
    """95 % interval of the share of True; None if nothing was judged. Judgements of a row, a story, hang together."""
    if not any(rows):
        return None
    return interval(np.array([[sum(row), len(row)] for row in rows if row], float), lambda drawn: drawn[0] / drawn[1])


def interval(rows: Float[np.ndarray, "n c"], statistic: Callable[[Any], Any], seed: int = 0) -> list[float]:
    """95 % interval of a statistic of the columns' sums, by drawing whole rows anew.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13). The statistic gets an array of "c draws".
    """
    draws = np.random.default_rng(seed).integers(len(rows), size=(RESAMPLES, len(rows)))
    low, high = np.quantile(statistic(rows[draws].sum(1).T), [0.025, 0.975])
    return [float(low), float(high)]
