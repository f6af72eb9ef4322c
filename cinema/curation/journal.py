"""What models answered, kept so that nothing is paid for twice: one JSON line each, written at once, never changed."""

import contextlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from cinema.chat import Reply
from cinema.curation.store import writing

Key = tuple[str, str, str, int]  # hash of the frame, model, hash of the prompt, 0 or 1 for the repair


class Journal:
    """The answers in a file, or for a while if it is None. One process at a time has it open, others wait.

    Opening and `add` raise StoppedError where nothing can be written.
    """

    def __init__(self, path: Path | None):
        self._path, self.answers = path or Path(), dict[Key, Reply]()
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0) if path else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        with contextlib.suppress(ImportError):  # Windows has no such lock
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.seek(0)
        whole, _, half = self._file.read().rpartition(b"\n")
        self._file.truncate(self._file.tell() - len(half))  # a power cut or a full disk may leave half a line
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                frame, model, prompt, turn = entry.pop("key")
                self.answers[frame, model, prompt, turn] = Reply(**entry)

    def add(self, key: Key, reply: Reply) -> None:
        """Keep an answer; it is on disk when this returns."""
        self.answers[key] = reply
        line = (json.dumps({"key": key, **asdict(reply)}) + "\n").encode()
        with writing(self._path):
            while line:  # a disk that is nearly full takes a part
                line = line[self._file.write(line) :]
            os.fsync(self._file)

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()
