"""Finding films: in folders and links, whatever they are called, and reading their headers.

Files are opened in child processes only: a file that crashes a decoder must not end the run.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cinema.curation.film import Film, probe
from cinema.curation.pool import Ask, run_jobs
from cinema.curation.remote import is_remote, list_films
from cinema.errors import UserError

_ENDINGS = "3gp asf avi divx dv f4v flv m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf ogv rm rmvb ts vob webm wmv y4m"
SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split())
# What is a film by any other name. FFmpeg opens more: text drawn as a terminal, raw pixels of no known size, images.
CONTAINERS = frozenset(["asf", "avi", "flv", "matroska", "mov", "mpeg", "mpegts", "mxf", "ogg"])


def find_films(paths: Sequence[Path | str], out: Path | str = "") -> list[Path | str]:
    """Films named, and those in folders named, with folders in them: sorted by path, each once.

    A file with a film's ending is taken as one, whatever is in it; one with another ending if it opens as a film.
    Hidden files are passed over, and so is the folder `out`. Links are followed, loops of them too. At an address
    such as "s3://bucket/films" only endings count. UserError where a folder holds no film.
    """
    films = list[Path | str]()
    for path in map(str, paths):
        if is_remote(path):
            found: Sequence[Path | str] = list_films(path, SUFFIXES)
        else:
            found = _films_in(Path(path), out) if os.path.isdir(path) else [Path(path)]
        if not found:
            raise UserError(f"{path}: no film lies in this folder; name a folder with films, or the films")
        films += found
    return list(dict.fromkeys(films))


def _films_in(folder: Path, out: Path | str) -> list[Path]:
    files = list(_files(folder, {os.path.realpath(out)} if out else set()))
    others = [path for path in files if path.suffix.lower() not in SUFFIXES]
    headers = zip(others, look_at(others), strict=True)  # a still picture, such as AVIF, is a film of one frame
    films = {path for path, film in headers if film and film.container in CONTAINERS and film.expected_frames > 1}
    return [path for path in files if path.suffix.lower() in SUFFIXES or path in films]


def _files(place: Path, seen: set[str]) -> Iterator[Path]:
    """This file, or the files in this folder and in those in it, sorted: what is not hidden and not `seen` yet."""
    if (real := os.path.realpath(place)) in seen:
        return
    seen.add(real)
    if place.is_file():
        yield place
    elif place.is_dir() and os.access(place, os.R_OK):
        for path in sorted(place.iterdir()):
            yield from () if path.name.startswith(".") else _files(path, seen)


def look_at(films: Sequence[Path]) -> list[Film | None]:
    """The header of every film; None for what does not open as one, or crashes a child."""
    headers: dict[int, Any] = dict(run_jobs(_header, films, limit_s=60.0))
    return [header if isinstance(header := headers[number], Film) else None for number in range(len(films))]


def _header(path: Path, ask: Ask) -> Film | None:
    with contextlib.suppress(UserError):
        return probe(path)
    return None
