"""Films and results at addresses such as ``s3://bucket/films``, through fsspec: copied here to be read, sent when done.

What is sent is kept here as well, so a killed run goes on from there. All raise StoppedError for what is out of reach.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import fsspec

from cinema.curation.store import StoppedError
from cinema.errors import UserError
from cinema.files import atomic

SMALL = (".json", ".jsonl", ".md", ".html")  # files that may change without changing their size


def is_remote(address: str) -> bool:
    """Whether an address names another place than a path of this machine."""
    return "://" in address


def list_films(address: str, endings: frozenset[str]) -> list[str]:
    """The film at an address, or the films below it by their endings, sorted."""
    with reaching(address):
        fs, path = fsspec.url_to_fs(address)
        found = [p for p in fs.find(path) if PurePosixPath(p).suffix.lower() in endings]
        return [fs.unstrip_protocol(p) for p in sorted(found)] if fs.isdir(path) else [address]


def mirror(address: str) -> Path:
    """The folder of this machine that mirrors an address; what is there and not here is fetched, videos excepted."""
    folder = _cache(address)
    folder.mkdir(parents=True, exist_ok=True)
    with reaching(address):
        fs, root = fsspec.url_to_fs(address)
        for path in fs.find(root):
            here = folder / PurePosixPath(path).relative_to(root)
            if here.suffix != ".tar" and not here.exists():
                with atomic(here) as part:
                    fs.get_file(path, str(part))
    return folder


def send(folder: Path, address: str, pattern: str = "[!.]*") -> None:
    """Send the files of a mirror of such names that are not at the address yet, done-files last."""
    files = [path for path in folder.rglob(pattern) if path.is_file()]
    with reaching(address):
        fs, root = fsspec.url_to_fs(address)
        for path in sorted(files, key=lambda path: path.name.endswith(".done.json")):
            there = str(PurePosixPath(root, path.relative_to(folder).as_posix()))
            if path.suffix in SMALL or not fs.exists(there) or fs.size(there) != path.stat().st_size:
                fs.makedirs(str(PurePosixPath(there).parent), exist_ok=True)
                fs.put_file(str(path), there)


@contextmanager
def fetched(source: str, film: Path, sidecar: str) -> Iterator[None]:
    """Copy a film, and a file of the ending `sidecar` beside it, for the length of a block; UserError without film."""
    try:
        with reaching(source):
            fs, path = fsspec.url_to_fs(source)
            film.parent.mkdir(parents=True, exist_ok=True)
            for ending in filter(None, (film.suffix, sidecar)):
                there = str(PurePosixPath(path).with_suffix(ending))
                if fs.exists(there):
                    fs.get_file(there, str(film.with_suffix(ending)))
        if not film.exists():
            raise UserError(f"{source}: there is no such film; correct the address")
        yield
    finally:
        shutil.rmtree(film.parent, ignore_errors=True)


def incoming(source: str) -> Path:
    """Where on this machine `fetched` is to put the film at an address: always the same place."""
    return _cache(source) / PurePosixPath(source).name


def _cache(address: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "cinema" / "curate" / hashlib.sha256(address.encode()).hexdigest()[:16]


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Turn what goes wrong at an address into StoppedError, for the length of a block."""
    try:
        yield
    except (OSError, ImportError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise StoppedError(f"{address}: cannot be reached ({why}); correct the address or the access to it") from None
