"""What children of the tests of curation do: here, and not beside the tests, so that they import little."""

import fcntl
import os
import signal
import threading
from pathlib import Path
from typing import Any

from cinema.curation import Annotator, StoppedError


class Fatal(Annotator):
    """An annotator whose process ends badly at films of certain names."""

    def caption(self, film: Path, shots: Any, desk: Any = None) -> Any:
        with open(film.with_suffix(".tries"), "a") as tries:
            tries.write("x")
        if film.stem == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if film.stem == "hang":
            threading.Event().wait()
        if film.stem == "bug":
            raise RuntimeError("the roof\nfell in")
        if film.stem == "unlucky" and film.with_suffix(".tries").read_text() == "x":
            os._exit(9)
        return super().caption(film, shots)


class Killer(Annotator):
    """Kills the process that started its own, as `kill -9` does, and goes on."""

    def caption(self, film: Path, shots: Any, desk: Any = None) -> Any:
        fcntl.flock(os.open(film.with_suffix(".lock"), os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)  # ours while we live
        os.kill(int(film.with_suffix(".pid").read_text()), signal.SIGKILL)
        desk.tell(0.5)
        film.with_suffix(".alive").touch()
        return super().caption(film, shots)


def double(job: int, ask: Any) -> int:
    if job < 0:
        raise StoppedError("enough")
    return 2 * job * ask("factor", job)
