"""What models answered, kept so that nothing is paid for twice: one JSON line each, written at once, never changed."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cinema.curation.store import writing

Key = tuple[str, str, str, int]  # hash of the frame, model, hash of the prompt, 0 or 1 for the repair


@dataclass(frozen=True)
class Reply:
    """A model's answer: its text, why it ended ("stop", "length", "content_filter"), and tokens paid for it."""

    text: str
    finish: str = "stop"
    tokens: int = 0


class Journal:
    """The answers in a file; see the module's text. One process at a time has it open, others wait.

    Args:
        path: the file; without one nothing is kept.

    Raises:
        StoppedError: nothing can be written there.
    """

    def __init__(self, path: Path | None):
        self._path, self._handle, self._known = path, -1, dict[Key, Reply]()
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                self._read()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def find(self, key: Key) -> Reply | None:
        """The answer of an earlier run or of this one."""
        return self._known.get(key)

    def add(self, key: Key, reply: Reply) -> None:
        """Keep an answer; it is on disk when this returns. Raises StoppedError where nothing can be written."""
        self._known[key] = reply
        if self._path is not None:
            line = (json.dumps({"key": key, **asdict(reply)}) + "\n").encode()
            with writing(self._path):
                while line:  # a disk that is nearly full takes a part
                    line = line[os.write(self._handle, line) :]
                os.fsync(self._handle)

    def _read(self) -> None:
        with contextlib.suppress(ImportError):  # Windows has no such lock
            import fcntl

            fcntl.flock(self._handle, fcntl.LOCK_EX)
        with open(self._handle, "rb", closefd=False) as file:
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # a power cut, or a full disk: the rest of a line
            os.ftruncate(self._handle, len(whole))
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                frame, model, prompt, turn = entry.pop("key")
                self._known[frame, model, prompt, turn] = Reply(**entry)
