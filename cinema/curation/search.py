"""Finding films: in folders and links, whatever they are called, and how long they are.

Files are opened in child processes only: a file that crashes a decoder must not end the run.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av

from cinema.curation.film import probe
from cinema.curation.pool import Ask, Died, run_jobs
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
    films, hidden = list[Path | str](), Path(out) if out and not is_remote(str(out)) else None
    for path in paths:
        if is_remote(str(path)):
            found: Sequence[Path | str] = list_films(str(path), SUFFIXES)
        else:
            found = _films_in(Path(path), hidden) if Path(path).is_dir() else [Path(path)]
        if not found:
            own = hidden and hidden.exists() and hidden.samefile(path)
            why = "no film is looked for in the folder of the results" if own else "no film lies in this folder"
            raise UserError(f"{path}: {why}; name a folder with films, or the films")
        films += found
    return list(dict.fromkeys(films))


def _films_in(folder: Path, out: Path | None) -> list[Path]:
    once = {path.resolve(): path for path in sorted(_files(folder, out), reverse=True)}  # of links to one, the first
    files = sorted(path for path in once.values() if path.suffix.lower() not in PICTURES)
    others = [path for path in files if path.suffix.lower() not in SUFFIXES]
    no_films = {path for path, found in zip(others, lengths(others, strict=True), strict=True) if found is None}
    return [path for path in files if path not in no_films]


def _files(folder: Path, out: Path | None) -> Iterator[Path]:
    seen = {out.resolve()} if out else set[Path]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for name in names if not name.startswith(".") and (path := Path(place, name)).is_file())


def lengths(films: Sequence[Path], strict: bool = False, chunk: int = 64) -> list[tuple[int, float] | None]:
    """Frames to expect, at least 1, and seconds, of every film; None for what is none, or crashes a child.

    `strict` tells films from what only opens as one; a child looks at `chunk` files.
    """
    chunks = [films[i : i + chunk] for i in range(0, len(films), chunk)]
    found = dict(run_jobs(_look, [(files, strict) for files in chunks], limit_s=60.0))
    for number, files in enumerate(chunks):
        if isinstance(found[number], Died):  # one of them is to blame: each in a child of its own
            found[number] = lengths(files, strict, chunk=1) if len(files) > 1 else [None]
    return [facts for number in range(len(chunks)) for facts in found[number]]


def _look(job: tuple[Sequence[Path], bool], ask: Ask) -> list[tuple[int, float] | None]:
    files, strict = job
    return [_facts(path, strict) for path in files if ask("looking", None)]  # the parent hears that it goes on


def _facts(path: Path, strict: bool) -> tuple[int, float] | None:
    try:
        film = probe(path)
        if strict:
            with av.open(str(path)) as container:
                names = set(container.format.name.split(","))
            if names & NO_FILMS or any(name.endswith("_pipe") for name in names):
                return None
        return film.expected_frames, film.duration_s or 0.0
    except (UserError, OSError, ValueError, av.FFmpegError):
        return None
