"""Finding films: in folders and links, whatever they are called, and how long they are.

Files are opened in child processes only: a file that crashes a decoder must not end the run.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av

from cinema.curation.film import probe
from cinema.curation.pool import run_jobs
from cinema.curation.remote import is_remote, list_films
from cinema.errors import UserError

_ENDINGS = "3gp asf avi divx dv f4v flv m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf ogv rm rmvb ts vob webm wmv y4m"
SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split())
# What opens as a "film" and is none: text drawn as a terminal, raw pixels of no known size, pictures.
NO_FILMS = frozenset(["adf", "apng", "ico", "bin", "gif", "idf", "image2", "rawvideo", "tty", "xbin"])
PICTURES = frozenset([".avif", ".heic", ".heif"])  # that open like MP4


def find_films(paths: Sequence[Path | str], out: Path | str = "") -> list[Path | str]:
    """Films named, and those in folders named, with folders in them: sorted by path, each once.

    A file with a film's ending is taken as one, whatever is in it; one with another ending if it opens as a film.
    Hidden files are passed over, and so is the folder `out`. Links are followed, loops of them too. At an address
    such as "s3://bucket/films" only endings count. UserError where a folder holds no film.
    """
    films, hidden = list[Path | str](), Path(out).resolve() if out else None
    for path in paths:
        if is_remote(str(path)):
            found: Sequence[Path | str] = list_films(str(path), SUFFIXES)
        else:
            found = _films_in(Path(path), hidden) if Path(path).is_dir() else [Path(path)]
        if not found:
            own = Path(path).resolve() == hidden
            why = "no film is looked for in the folder of the results" if own else "no film lies in this folder"
            raise UserError(f"{path}: {why}; name a folder with films, or the films")
        films += found
    return list(dict.fromkeys(films))


def _films_in(folder: Path, out: Path | None) -> list[Path]:
    once = {path.resolve(): path for path in sorted(_files(folder, out), reverse=True)}  # of links to one, the first
    files = sorted(path for path in once.values() if path.suffix.lower() not in PICTURES)
    others = [path for path in files if path.suffix.lower() not in SUFFIXES]
    no_films = {path for path, facts in zip(others, look_at(others), strict=True) if facts is None or not facts[2]}
    return [path for path in files if path not in no_films]


def _files(folder: Path, out: Path | None) -> Iterator[Path]:
    seen = {out}
    for place, folders, names in os.walk(folder, followlinks=True):
        shown = [Path(place, name) for name in names if not name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := Path(place).resolve()) in seen:
            shown, folders[:] = [], []
        seen.add(real)
        yield from (path for path in shown if path.is_file())


def look_at(films: Sequence[Path]) -> list[tuple[int, float, bool] | None]:
    """Frames to expect, at least 1, seconds, and whether it does not only open as a film, of every film; None for what
    does not open as one, or crashes a child."""
    facts: dict[int, Any] = dict(run_jobs(_facts, films, limit_s=60.0))
    return [facts[number] if isinstance(facts[number], tuple) else None for number in range(len(films))]


def _facts(path: Path, ask: Any) -> tuple[int, float, bool] | None:
    try:
        film = probe(path)
        with av.open(str(path)) as container:
            name = container.format.name
        return film.expected_frames, film.duration_s or 0.0, not (NO_FILMS & set(name.split(",")) or "_pipe" in name)
    except (UserError, OSError, ValueError, av.FFmpegError):
        return None
