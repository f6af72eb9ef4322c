"""Shooting toy films: H.264 with hard cuts or with all that makes cutting hard, and beside ``a.mp4`` the exact truth.

``a.json`` has the story, and for every shot its frames, caption, looks and boxes."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cinema.errors import UserError
from cinema.files import sweep, write_json
from cinema.media import FilmWriter
from cinema.progress import Progress
from cinema.toyworld.draw import render
from cinema.toyworld.reader import cut_out
from cinema.toyworld.world import FPS, FRAMES, Movie, Setup, sample_movie

OVERLAP = 4  # frames of a dissolve, and of each half of a fade
BLACK = 3  # black frames in the middle of a fade, and around title cards
TRANSITIONS = ("cut", "dissolve", "fade")


@dataclass(frozen=True)
class _Piece:
    """Frames that follow each other: a shot (its number), or a card or black (-1); how it is joined to the last."""

    frames: list[Image.Image]
    shot: int
    transition: str


def draw_clip(movie: Movie, setup: Setup, height: int = 128, frames: int = FRAMES) -> list[Image.Image]:
    """All frames of a shot, evenly spaced in time from 0 to 1; the first is its keyframe."""
    return [render(movie, setup, height, k / max(1, frames - 1)) for k in range(frames)]


def write_film(
    movie: Movie,
    path: Path,
    *,
    height: int = 128,
    fps: int = FPS,
    frames: int = FRAMES,
    transitions: bool = False,
    letterbox: int = 0,
    titles: bool = False,
    crf: int = 18,
    on_progress: Progress | None = None,
) -> Path:
    """Write a movie as MP4, and its ground truth beside it; both appear whole or not at all, the truth last.

    Args:
        height: pixels of the picture, even; it is twice as wide.
        frames: frames of every shot.
        transitions: join shots by hard cuts, dissolves and fades through black, by chance; else by hard cuts alone.
        letterbox: height of the black bar above, and of the one below, in pixels.
        titles: begin and end with a title card, each framed by black.
        on_progress: told (shots written, of how many, message).

    Returns:
        The path of the ground truth. Its frame numbers count from 0, ends are exclusive. A dissolve is cut where
        the new shot outweighs the old one, a fade where black ends; `cuts` has the end of each card, too. Boxes
        are [left, top, right, bottom] in pixels of the film, in the shot's first frame as drawn.

    Raises:
        UserError: an odd height, shots too short for their transitions, or a path that is no MP4.
    """
    settings = {"height": height, "fps": fps, "frames": frames, "transitions": transitions}
    settings |= {"letterbox": letterbox, "titles": titles, "crf": crf}
    least = 2 * OVERLAP + 1 if transitions else 1
    if frames < least or height < 16 or letterbox < 0:
        what = f"{frames} frames a shot of {height} pixels with bars of {letterbox}"
        raise UserError(f"{path}: {what} make no film; it takes {least} frames, 16 pixels and bars of 0 or more")
    sidecar, size = path.with_suffix(".json"), (2 * height, height + 2 * letterbox)
    writer, captions = FilmWriter(path, *size, fps, crf), movie.captions()
    sidecar.unlink(missing_ok=True)  # it must never describe another film
    shots, cuts = list[dict[str, Any]](), list[int]()
    with writer:
        for piece in _joined(_pieces(movie, height, frames, transitions, titles)):
            cuts.append(writer.frames)
            if piece.shot >= 0:
                shots.append(_shot(movie, captions[piece.shot], piece, writer.frames, height, letterbox))
            for image in piece.frames:
                writer.add(ImageOps.expand(image, (0, letterbox)))
            if on_progress and piece.shot >= 0:
                on_progress(piece.shot + 1, len(movie.shots), path.name)
    truth = {"story": movie.story().model_dump(), "shots": shots, "cuts": cuts[1:], "bars": [letterbox, letterbox]}
    write_json(sidecar, truth | {"fps": fps, "height": size[1], "width": size[0], "settings": settings})
    return sidecar


def write_films(
    count: int, seed: int, out: Path, on_progress: Progress | None = None, *, shots: int = 8, **options: Any
) -> list[Path]:
    """Write ``film-<seed>-00000.mp4`` and so on, of random movies; those that are there already are kept as they are.

    Args:
        on_progress: told (films done, of how many, message).
        options: as for `write_film`.
    """
    films = [out / f"film-{seed}-{i:05d}.mp4" for i in range(count)]
    for i, path in enumerate(films):
        movie = sample_movie(f"film/{seed}/{i}", shots)
        sweep(out, path.stem)
        if not _is_finished(movie, path, options):
            write_film(movie, path, **options)
        if on_progress:
            on_progress(i + 1, count, path.name)
    return films


def _is_finished(movie: Movie, path: Path, options: dict[str, Any]) -> bool:
    """Whether this film is there, made with these settings, as far as its ground truth tells."""
    wanted = {name: p.default for name, p in signature(write_film).parameters.items()} | options
    try:
        truth = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        same = all(wanted[name] == value for name, value in truth["settings"].items())
        return same and truth["story"] == movie.story().model_dump() and path.is_file()
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False


def _pieces(movie: Movie, height: int, frames: int, transitions: bool, titles: bool) -> Iterator[_Piece]:
    rng = random.Random(f"transitions/{movie.title}")
    yield from _titled(movie.title, height) if titles else []
    for i, setup in enumerate(movie.shots):
        transition = rng.choice(TRANSITIONS) if transitions and i else "cut"
        yield _Piece(draw_clip(movie, setup, height, frames), i, transition)
    yield from _titled("The end", height) if titles else []


def _titled(text: str, height: int) -> list[_Piece]:
    """A title card between black frames."""
    black, card = (Image.new("RGB", (2 * height, height), colour) for colour in ((0, 0, 0), (24, 20, 34)))
    font = ImageFont.load_default(min(height / 8, 3.2 * height / max(1, len(text))))
    ImageDraw.Draw(card).text((height, height / 2), text, (240, 232, 214), font, anchor="mm")
    return [_Piece([image] * n, -1, "cut") for image, n in ((black, BLACK), (card, FPS), (black, BLACK))]


def _joined(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    """The pieces as they are written, those with a transition in parts; one is held back, to be joined to the next."""
    held = next(pieces)

    def mix(old: list[Image.Image], new: list[Image.Image]) -> list[Image.Image]:
        return [Image.blend(a, b, (k + 1) / (OVERLAP + 1)) for k, (a, b) in enumerate(zip(old, new, strict=True))]

    for piece in pieces:
        if piece.transition == "cut":
            yield held
            held = piece
            continue
        old, new = held.frames[-OVERLAP:], piece.frames[:OVERLAP]
        black = [Image.new("RGB", new[0].size)]
        tail, head = mix(old, black * OVERLAP), mix(black * OVERLAP, new)
        if piece.transition == "dissolve":
            tail, head = (mixed := mix(old, new))[: OVERLAP // 2], mixed[OVERLAP // 2 :]
        yield replace(held, frames=held.frames[:-OVERLAP] + tail)
        if piece.transition == "fade":
            yield _Piece(black * BLACK, -1, "cut")
        held = replace(piece, frames=head + piece.frames[OVERLAP:])
    yield held


def _shot(movie: Movie, caption: str, piece: _Piece, start: int, height: int, letterbox: int) -> dict[str, Any]:
    """The truth about a shot that begins in frame `start` of the film; boxes leave shadows out."""
    setup, actors = movie.shots[piece.shot], []
    for actor in setup.actors:
        solid = cut_out(movie.cast[actor.tag], setup, actor, height=height)[1] > 0.5
        left, top, right, bottom = Image.fromarray(solid).getbbox() or (0, 0, 0, 0)
        actors.append(vars(actor) | {"box": [left, top + letterbox, right, bottom + letterbox]})
    looks = {actor.tag: vars(movie.cast[actor.tag]) for actor in setup.actors}
    truth = {"start_frame": start, "end_frame": start + len(piece.frames), "caption": caption}
    truth |= {"transition": piece.transition, "looks": looks, "actors": actors}
    return truth | {"place": setup.place, "size": setup.size, "camera": setup.camera}
