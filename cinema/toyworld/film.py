"""Shooting toy films: H.264 with hard cuts or with all that makes cutting hard, and beside ``a.mp4`` the exact truth.

``a.json`` has the story, and for every shot its frames, caption, looks and boxes."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cinema.errors import UserError
from cinema.files import sweep, write_json
from cinema.media import film_writer
from cinema.progress import Progress, quiet
from cinema.toyworld.draw import render
from cinema.toyworld.reader import cut_out
from cinema.toyworld.world import FPS, FRAMES, Movie, Setup, sample_movie

OVERLAP = 4  # frames of a dissolve, and of each half of a fade
BLACK = 3  # black frames in the middle of a fade, and around title cards
TRANSITIONS = ("cut", "dissolve", "fade")


@dataclass(frozen=True)
class Shooting:
    """How a film is made of a movie."""

    height: int = 128  #: pixels of the picture, even; it is twice as wide
    fps: int = FPS
    frames: int = FRAMES  #: of every shot
    transitions: bool = False  #: join shots by hard cuts, dissolves and fades through black, by chance; else by cuts
    letterbox: int = 0  #: height of the black bar above, and of the one below, in pixels
    titles: bool = False  #: begin and end with a title card, each framed by black
    crf: int = 18  #: x264's constant rate factor


def draw_clip(movie: Movie, setup: Setup, height: int = 128, frames: int = FRAMES) -> list[Image.Image]:
    """All frames of a shot, evenly spaced in time from 0 to 1; the first is its keyframe."""
    return [render(movie, setup, height, k / max(1, frames - 1)) for k in range(frames)]


def write_film(movie: Movie, path: Path, on_progress: Progress = quiet, **options: Any) -> Path:
    """Write a movie as MP4, and its ground truth beside it; both appear whole or not at all, the truth last.

    `options` are those of `Shooting`; progress counts shots. Gives the path of the truth. Its frame numbers count from
    0, ends are exclusive; a dissolve is cut where the new shot outweighs the old one, a fade where black ends; `cuts`
    has the end of each card, too. Boxes are [left, top, right, bottom] in pixels of the shot's first frame as drawn.
    UserError for an odd height, or shots too short for their transitions.
    """
    how = Shooting(**options)
    least = 2 * OVERLAP + 1 if how.transitions else 1
    if how.frames < least or how.height < 16 or how.height % 2 or how.letterbox < 0:
        what = f"{how.frames} frames a shot of {how.height} pixels with bars of {how.letterbox}"
        raise UserError(f"{path}: {what} make no film; it takes {least} frames, 16 pixels (even), bars of 0 or more")
    width, height, bar = 2 * how.height, how.height + 2 * how.letterbox, how.letterbox
    sidecar, end = path.with_suffix(".json"), 0
    sidecar.unlink(missing_ok=True)  # it must never describe another film
    captions, shots, cuts = iter(movie.captions()), list[dict[str, Any]](), list[int]()
    with film_writer(path, width, height, how.fps, how.crf) as add:
        for setup, transition, frames in _pieces(movie, how):
            start, end = end, end + len(frames)
            cuts.append(start)
            for image in frames:
                add(ImageOps.expand(image, (0, bar)))
            if setup:
                actors = list[dict[str, Any]]()
                for actor in setup.actors:  # boxes leave shadows out
                    solid = cut_out(movie.cast[actor.tag], setup, actor, height=how.height)[1] > 0.5
                    left, top, right, bottom = Image.fromarray(solid).getbbox() or (0, 0, 0, 0)
                    actors.append(asdict(actor) | {"box": [left, top + bar, right, bottom + bar]})
                looks = {actor.tag: asdict(movie.cast[actor.tag]) for actor in setup.actors}
                span = {"start_frame": start, "end_frame": end, "caption": next(captions)}
                shots.append(asdict(setup) | span | {"transition": transition, "looks": looks, "actors": actors})
                on_progress(len(shots), len(movie.shots), path.name)
    truth = _identity(movie, how) | {"shots": shots, "cuts": cuts[1:], "bars": [bar, bar]}
    write_json(sidecar, truth | {"fps": how.fps, "height": height, "width": width})
    return sidecar


def write_films(
    count: int, seed: int, out: Path, on_progress: Progress = quiet, *, shots: int = 8, **options: Any
) -> list[Path]:
    """Write ``film-<seed>-00000.mp4`` and so on, of random movies; those that are there already are kept as they are.

    `options` are those of `Shooting`; progress counts films.
    """
    films = [out / f"film-{seed}-{i:05d}.mp4" for i in range(count)]
    for i, path in enumerate(films):
        movie = sample_movie(f"film/{seed}/{i}", shots)
        sweep(out, path.stem)
        try:
            truth = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            finished = path.is_file() and _identity(movie, Shooting(**options)).items() <= truth.items()
        except (OSError, ValueError, AttributeError):
            finished = False
        if not finished:
            write_film(movie, path, **options)
        on_progress(i + 1, count, path.name)
    return films


def _identity(movie: Movie, how: Shooting) -> dict[str, Any]:
    """What a film is made of: where it is the same, so is the film."""
    return {"story": movie.story().model_dump(), "settings": asdict(how)}


def _pieces(movie: Movie, how: Shooting) -> Iterator[tuple[Setup | None, str, list[Image.Image]]]:
    """Frames that follow each other: of a shot, with how it begins; or a card or black, which are of none."""
    rng, size, old = random.Random(f"transitions/{movie.title}"), (2 * how.height, how.height), list[Image.Image]()
    black, start = [Image.new("RGB", size)] * OVERLAP, "cut"

    def titled(text: str) -> Iterator[tuple[None, str, list[Image.Image]]]:
        card, letters = Image.new("RGB", size, (24, 20, 34)), min(how.height / 8, 3.2 * how.height / max(1, len(text)))
        draw, font, middle = ImageDraw.Draw(card), ImageFont.load_default(letters), (how.height, how.height / 2)
        draw.text(middle, text, (240, 232, 214), font, anchor="mm")
        yield from ((None, "cut", frames) for frames in (black[:BLACK], [card] * FPS, black[:BLACK]))

    def mixed(old: list[Image.Image], new: list[Image.Image]) -> list[Image.Image]:
        pairs = enumerate(zip(old[-OVERLAP:], new, strict=False))
        return [Image.blend(a, b, (k + 1) / (OVERLAP + 1)) for k, (a, b) in pairs]

    yield from titled(movie.title) if how.titles else ()
    for i, setup in enumerate(movie.shots):
        new, joined = draw_clip(movie, setup, how.height, how.frames), "cut"
        if i:
            joined = rng.choice(TRANSITIONS) if how.transitions else "cut"
            if joined == "fade":
                old[-OVERLAP:], new[:OVERLAP] = mixed(old, black), mixed(black, new)
            elif joined == "dissolve":
                both = mixed(old, new)
                old[-OVERLAP:], new[:OVERLAP] = both[: OVERLAP // 2], both[OVERLAP // 2 :]
            yield movie.shots[i - 1], start, old
            if joined == "fade":
                yield None, "cut", black[:BLACK]
        old, start = new, joined
    yield movie.shots[-1], start, old
    yield from titled("The end") if how.titles else ()
