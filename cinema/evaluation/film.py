"""A film or storyboard as it is scored: its story, and its pictures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import av
import numpy as np
from PIL import Image

from cinema.errors import UserError
from cinema.story import Story, load_story

LOOK = (160, 80)  # pixels at which pictures are compared
NEAR = 4.0  # mean difference of two pictures, of 255, below which one repeats the other


@dataclass(frozen=True)
class Film:
    """A story and its pictures: keyframes, and, where it has been filmed, how many frames every shot has."""

    path: Path
    story: Story
    keyframes: list[Image.Image | None]
    counts: list[int]  #: frames of each shot; none of a storyboard

    def shots(self) -> Iterator[list[Image.Image]]:
        """The frames of one shot after another; of a storyboard, its keyframes."""
        if not self.counts:
            yield from ([image] for image in self.keyframes if image)
            return
        with av.open(str(self.path)) as container:
            frames = (frame.to_image() for frame in container.decode(video=0))
            for count in self.counts:
                yield [*islice(frames, count)]


def read_film(path: Path) -> Film:
    """A folder that `cinema plan` wrote, or a film beside which is what `cinema movie` or the toy world wrote.

    UserError if there is no story, a picture or the film cannot be read, or it has other shots than its story.
    """
    if path.is_dir():
        script = path / "story.yaml"
        if not script.is_file():
            raise UserError(f"{path}: there is no story.yaml, so it is no storyboard; make one with `cinema plan`")
        story = load_story(script)
        pictures = [_picture(path / (shot.keyframe or "")) for shot in story.shots]
        if None in pictures:
            raise UserError(f"{path}: shot {pictures.index(None) + 1} has no keyframe; plan the story again")
        return Film(path, story, pictures, [])
    manifest = path.with_suffix(".json")
    if not manifest.is_file():
        raise UserError(f"{path}: there is no story beside it, {manifest.name}; give a film that `cinema movie` wrote")
    try:
        told = json.loads(manifest.read_text(encoding="utf-8"))
        story, spans = Story.model_validate(told["story"]), [(s["start_frame"], s["end_frame"]) for s in told["shots"]]
        with av.open(str(path)) as container:
            length = sum(1 for _ in container.decode(video=0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest}: not the story of a readable film ({error}); make the film again") from None
    ends = [0, *(end for _, end in spans)]
    if len(spans) != len(story.shots) or ends[-1] != length or [a for a, _ in spans] != ends[:-1]:
        told = f"{len(spans)} shots up to frame {ends[-1]}, the story {len(story.shots)} and the film {length} frames"
        raise UserError(f"{manifest}: tells of {told}; make the film again")
    work = path.with_name(f"{path.stem}.work") / "keyframes"
    return Film(path, story, [_picture(work / f"{i:03d}.png") for i in range(len(spans))], [b - a for a, b in spans])


def _picture(path: Path) -> Image.Image | None:
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: not a picture ({error}); plan it again") from None


def diversity(firsts: Sequence[Image.Image]) -> list[bool]:
    """Of every two shots: whether they are two pictures, and not one again."""
    small = [np.asarray(x.resize(LOOK, Image.Resampling.BOX), np.float32) for x in firsts]
    return [bool(np.abs(a - b).mean() >= NEAR) for a, b in combinations(small, 2)]
