"""Shooting toy films: H.264 with hard cuts or with all that makes cutting hard, and beside ``a.mp4`` the exact truth.

``a.json`` has the story, and for every shot its frames, caption, looks, actions and boxes."""

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cinema.errors import UserError
from cinema.files import sweep, write_json
from cinema.media import film_writer
from cinema.progress import Progress, quiet
from cinema.toyworld.draw import render
from cinema.toyworld.reader import cut_out
from cinema.toyworld.world import FPS, FRAMES, Actor, Movie, Setup, sample_movie

OVERLAP = 4  # frames of a dissolve, and of each half of a fade
BLACK = 3  # black frames in the middle of a fade, and around title cards
TRANSITIONS = ("cut", "dissolve", "fade")
SETTINGS = {
    "height": 128,  #: pixels of the picture, even; it is twice as wide
    "frames": FRAMES,  #: of every shot; with transitions at least 9
    "transitions": False,  #: join shots by hard cuts, dissolves and fades through black, by chance; else by cuts
    "letterbox": 0,  #: height of the black bar above, and of the one below, in pixels
    "titles": False,  #: begin and end with a title card, each framed by black
    "crf": 18,  #: x264's constant rate factor
}


def draw_clip(movie: Movie, setup: Setup, height: int = 128, frames: int = FRAMES) -> list[Image.Image]:
    """All frames of a shot, evenly spaced in time from 0 to 1; the first is its keyframe."""
    return [render(movie, setup, height, k / max(1, frames - 1)) for k in range(frames)]


def write_film(movie: Movie, path: Path, on_progress: Progress = quiet, **options: Any) -> Path:
    """Write a movie as MP4, and its ground truth beside it; both appear whole or not at all, the truth last.

    `options` replace some of `SETTINGS`. Gives the path of the truth. Its frame numbers count from 0, ends are
    exclusive; a dissolve is cut where the new shot outweighs the old one, a fade where black ends; `cuts` has the end
    of each card, too. Boxes are [left, top, right, bottom] in pixels of the shot's first frame as drawn, without
    shadows. UserError for settings that make no film.
    """
    height, frames, transitions, letterbox, titles, crf = (SETTINGS | options).values()
    least = 2 * OVERLAP + 1 if transitions else 1
    if frames < least or height < 16 or height % 2 or letterbox < 0:
        what = f"{frames} frames a shot of {height} pixels with bars of {letterbox}"
        raise UserError(f"{path}: {what} make no film; it takes {least} frames, 16 pixels (even), bars of 0 or more")
    size, sidecar, end = (2 * height, height + 2 * letterbox), path.with_suffix(".json"), 0
    captions, shots, cuts = iter(movie.captions()), list[dict[str, Any]](), list[int]()
    sidecar.unlink(missing_ok=True)  # it must never describe another film
    with film_writer(path, *size, FPS, crf) as add:
        for setup, transition, pictures in _pieces(movie, height, frames, transitions, titles):
            start, end = end, end + len(pictures)
            cuts.append(start)
            for image in pictures:
                add(ImageOps.expand(image, (0, letterbox)))
            if setup:
                actors = [asdict(a) | {"box": _box(movie, setup, a, height, letterbox)} for a in setup.actors]
                looks = {actor.tag: asdict(movie.cast[actor.tag]) for actor in setup.actors}
                span = {"start_frame": start, "end_frame": end, "caption": next(captions)}
                shots.append(asdict(setup) | span | {"transition": transition, "looks": looks, "actors": actors})
                on_progress(len(shots), len(movie.shots), path.name)
    truth = _identity(movie, options) | {"shots": shots, "cuts": cuts[1:], "bars": [letterbox, letterbox]}
    write_json(sidecar, truth | {"fps": FPS, "height": size[1], "width": size[0]})
    return sidecar


def _box(movie: Movie, setup: Setup, actor: Actor, height: int, bar: int) -> list[int]:
    solid = cut_out(movie.cast[actor.tag], setup, actor, height=height)[1] > 0.5
    left, top, right, bottom = Image.fromarray(solid).getbbox() or (0, 0, 0, 0)
    return [left, top + bar, right, bottom + bar]


def _identity(movie: Movie, options: dict[str, Any]) -> dict[str, Any]:
    """What a film is made of: where it is the same, so is the film."""
    return {"story": movie.story().model_dump(), "settings": SETTINGS | options}


def write_films(
    count: int, seed: int, out: Path, on_progress: Progress = quiet, *, shots: int = 8, **options: Any
) -> list[Path]:
    """Write ``film-<seed>-00000.mp4`` and so on, of random movies, as `write_film` does; progress counts films.

    Those that are there already are kept as they are.
    """
    films = [out / f"film-{seed}-{i:05d}.mp4" for i in range(count)]
    for i, path in enumerate(films):
        movie, truth = sample_movie(f"film/{seed}/{i}", shots), dict[str, Any]()
        sweep(out, path.stem)
        with suppress(OSError, ValueError):
            truth = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if not path.is_file() or not _identity(movie, options).items() <= truth.items():
            write_film(movie, path, **options)
        on_progress(i + 1, count, path.name)
    return films


def _pieces(
    movie: Movie, height: int, frames: int, transitions: bool, titles: bool
) -> Iterator[tuple[Setup | None, str, list[Image.Image]]]:
    """Frames that follow each other: of a shot, with how it begins; or a card or black, which are of none."""
    rng, size, old = random.Random(f"transitions/{movie.title}"), (2 * height, height), list[Image.Image]()
    black, start = [Image.new("RGB", size)] * OVERLAP, "cut"

    def titled(text: str) -> Iterator[tuple[None, str, list[Image.Image]]]:
        card, letters = Image.new("RGB", size, (24, 20, 34)), min(height / 8, 3.2 * height / max(1, len(text)))
        font = ImageFont.load_default(letters)
        ImageDraw.Draw(card).text((height, height / 2), text, (240, 232, 214), font, anchor="mm")
        yield from ((None, "cut", stills) for stills in (black[:BLACK], [card] * FPS, black[:BLACK]))

    def mixed(old: list[Image.Image], new: list[Image.Image]) -> list[Image.Image]:
        pairs = enumerate(zip(old[-OVERLAP:], new, strict=False))
        return [Image.blend(a, b, (k + 1) / (OVERLAP + 1)) for k, (a, b) in pairs]

    yield from titled(movie.title) if titles else ()
    for i, setup in enumerate(movie.shots):
        new, joined = draw_clip(movie, setup, height, frames), "cut"
        if i:
            joined = rng.choice(TRANSITIONS) if transitions else "cut"
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
    yield from titled("The end") if titles else ()
