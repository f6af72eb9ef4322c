"""Scores on the toy world, where a reader recovers from pixels who is really there.

A look is described at its character's first appearance only: there it must be drawn as told (*attributes*), later it
must come back from memory (*identity*). The control remembers another story: who is still right, is so by chance."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from cinema.config import Preset
from cinema.errors import UserError
from cinema.keyframes import KeyframePlanner, Pictures
from cinema.progress import Progress, quiet
from cinema.story import Story
from cinema.toyworld.draw import render
from cinema.toyworld.reader import read_clip, read_keyframe
from cinema.toyworld.world import Look, Movie, parse_caption, sample_movie

ATTRIBUTES = ("colour", "shape", "hat", "set", "position", "size")
LOOK = ATTRIBUTES[:3]
RESAMPLES = 2_000  # of the bootstrap
Looks = Literal["train", "unseen", "all"]
Rows = Sequence[Sequence[bool | float]]  # judgements, or figures, of every story


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
    """Score a story's keyframes, of any size, against its captions; None leaves a shot out.

    ValueError if a caption is not in the shot list's language or has no image.
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

    Gives shares of what is right: `attributes` (and `by_attribute`), `identity`, `last_identity` (of who comes back in
    the last shot) and `wrong_context_identity` (of the same, by the control, which takes two stories), None where
    nothing was judged; with 95 % intervals over stories in `ci95` and numbers of judgements in `counts`. UserError if
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
    for name, films in (("last_identity", drawn), ("wrong_context_identity", mixed)):
        rows[name] = [_score(story, images[-1:]).identity for story, images in zip(told, films, strict=False)]
    figures: dict[str, Any] = {"stories": stories, "shots": shots, "seed": seed, "preset": preset.name}
    figures |= {"looks": looks, "given": given} | {name: share(own) for name, own in rows.items()}
    figures["by_attribute"] = {name: share([s.attributes[name] for s in scores]) for name in ATTRIBUTES}
    figures["ci95"] = {name: bootstrap(own) for name, own in rows.items()}
    return figures | {"counts": {name: sum(map(len, own)) for name, own in rows.items()}}


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
