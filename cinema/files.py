"""Writing files so that each appears whole or not at all, also under `kill -9` and on a full disk."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cinema.errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends well, remove it otherwise.

    A link is followed: the file that it names is replaced. Raises UserError where `path` is no ordinary file.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no ordinary file, and would be replaced by one; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{os.getpid()}{path.suffix}")
    try:
        yield part
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def writable(path: Path | None) -> Path | None:
    """The path, if a file can be written there, else UserError: to be asked before the work, not after it."""
    above = next(folder for folder in path.absolute().parents if folder.exists()) if path else Path()
    if path and ((path.exists() and not path.is_file()) or not above.is_dir() or not os.access(above, os.W_OK)):
        raise UserError(f"{path}: cannot be written there; give a file in a folder that can be written to")
    return path


def sweep(folder: Path, stem: str = "*") -> None:
    """Remove the temporary files that killed runs left in a folder, for names that begin with `stem`."""
    for stale in folder.glob(f".{stem}.part*"):
        stale.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically, keys in the order given."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text.encode(errors="backslashreplace").decode())  # file names may hold what is no UTF-8
