"""Exact scores on the toy world, where a reader recovers from pixels who is really there, and in which set.

A look is described at its character's first appearance only: there it must be drawn as told (*attributes*), later it
must come back from memory (*identity*). A set's palette and props are told nowhere: its first picture sets them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from cinema.toyworld.reader import is_same_set, read_clip, read_keyframe
from cinema.toyworld.world import Look, Setup, parse_caption

ATTRIBUTES = ("colour", "shape", "hat", "set", "position", "size")
LOOK = ATTRIBUTES[:3]


@dataclass
class Scores:
    """Which of a story's claims its pictures keep; `attributes` are name → right or wrong, per first appearance."""

    attributes: dict[str, list[bool]] = field(default_factory=lambda: {name: [] for name in ATTRIBUTES})
    identity: list[bool] = field(default_factory=list)  #: colour, shape and hat all right, for later appearances
    together: list[bool] = field(default_factory=list)  #: those of it in shots of several characters
    sets: list[bool] = field(default_factory=list)  #: whether a set looks as where it was first seen
    confidence: list[float] = field(default_factory=list)  #: of the reader, 0 to 1, in everybody of every caption

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
    scores, looks, sets = Scores(), dict[str, Look](), dict[str, tuple[Image.Image, Setup]]()
    for caption, image in zip(captions, images, strict=True):
        setup, described = parse_caption(caption)
        looks |= described
        if image is None:
            continue
        seen = read_keyframe(image, setup)
        if setup.place in sets:
            scores.sets.append(is_same_set(*sets[setup.place], image, setup))
        sets.setdefault(setup.place, (image, setup))
        for actor in setup.actors:
            found, look = seen.actor(actor.tag), looks.get(actor.tag)
            scores.confidence.append(min(1.0, found.confidence) if found else 0.0)
            right = {n: found is not None and getattr(found.look, n) == getattr(look, n, None) for n in LOOK}
            if actor.tag not in described:
                scores.identity.append(all(right.values()))
                scores.together += scores.identity[-1:] * (len(setup.actors) > 1)
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
