"""Jobs in child processes, one each, so that a crash, a hang or a segmentation fault costs one job and not the run.

Child and parent move in step: every message of the child waits for the parent's answer. So a child whose parent was
killed ends at its next message, and a child that says nothing for too long is known to hang.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

from cinema.curation.store import StoppedError
from cinema.errors import UserError

TRIES = 2  # a crash may have been another's fault: memory taken away, a disk that was gone
START_S = 600.0  # seconds that a child may need to import what it needs
Ask = Callable[[str, Any], Any]  # (kind, value) -> the parent's answer
Function = Callable[[Any, Ask], Any]  # (job, ask) -> the job's result


@dataclass(frozen=True)
class Died:
    """The outcome of a job whose process crashed, hung or was killed at every try."""

    reason: str


@contextmanager
def _main_hidden(unless: bool) -> Iterator[None]:
    """Children started within this block do not run the user's script again, which may start this very run.

    `unless`: something that they are given is defined there.
    """
    module = sys.modules["__main__"]
    try:
        sys.modules["__main__"] = module if unless else ModuleType("__main__")
        yield
    finally:
        sys.modules["__main__"] = module


class _Child:
    """A process that does one job; `line` is ready to read when it has something to say, or is dead."""

    def __init__(self, context: Any, function: Function, job: Any, number: int, tries: int):
        self.number, self.tries = number, tries
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, function, job), daemon=True)
        with _main_hidden(unless=b"__main__" in pickle.dumps((function, job))):
            self.process.start()
        theirs.close()
        self.deadline = time.monotonic() + START_S

    def hear(self, limit_s: float, answer: Callable[[int, str, Any], Any]) -> tuple[str, Any]:
        """One message: ("done", result), ("died", why if known), or another kind, which was answered."""
        if not self.line.poll():
            return "died", f"its process showed no progress for {limit_s:g} s"
        try:
            kind, value = self.line.recv()
            if kind == "stopped":
                raise StoppedError(value)
            if kind not in ("done", "died"):
                self.line.send(kind == "started" or answer(self.number, kind, value))
        except (EOFError, OSError):
            return "died", ""
        self.deadline = time.monotonic() + limit_s
        return kind, value

    def end(self, grace_s: float = 0.0) -> str:
        """Kill it if it does not end by itself in `grace_s` seconds, and say how it ended."""
        self.process.join(grace_s)
        self.process.kill()
        self.process.join()
        self.line.close()
        code = self.process.exitcode or 0
        self.process.close()
        if code >= 0:
            return f"its process ended with code {code}"
        names = {s.value: s.name for s in signal.Signals}
        return f"its process was ended by {names.get(-code, -code)}" + " (out of memory?)" * (code == -9)


def run_jobs(
    function: Function,
    jobs: Sequence[Any],
    *,
    workers: int = 1,
    limit_s: float = 900.0,
    answer: Callable[[int, str, Any], Any] = lambda number, kind, value: True,
    go_on: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the job, what `function` returned or Died) in the order in which jobs end.

    Each job is a call `function(job, ask)` in a child of its own, of which there are `workers` at a time; both must be
    picklable. A child that says nothing for `limit_s` seconds is killed. For every message `answer` is called here, as
    (number of the job, kind, value), and the child gets what it returns. Once `go_on` says no, no job is begun.

    Raises StoppedError where a job raised it; all others are killed.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["cinema.curation.run"])  # imported once, so a child starts in milliseconds
    waiting, running = deque((number, 1) for number in range(len(jobs))), dict[Connection, _Child]()
    try:
        while (waiting and go_on()) or running:
            while waiting and len(running) < workers and go_on():
                number, tries = waiting.popleft()
                child = _Child(context, function, jobs[number], number, tries)
                running[child.line] = child
            ready = wait(list(running), max(0.0, min(c.deadline for c in running.values()) - time.monotonic()))
            for child in [c for c in running.values() if c.line in ready or c.deadline <= time.monotonic()]:
                kind, value = child.hear(limit_s, answer)
                if kind not in ("done", "died"):
                    continue
                del running[child.line]
                how = child.end(0.0 if value else 1.0)
                if kind == "died" and child.tries < TRIES:
                    waiting.appendleft((child.number, child.tries + 1))
                else:
                    yield child.number, value if kind == "done" else Died(f"{value or how}; it was tried {TRIES} times")
    finally:
        for child in running.values():
            child.end()


def _main(line: Connection, function: Function, job: Any) -> None:
    """What a child does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted as well, and ends us
    if cv2 := sys.modules.get("cv2"):
        cv2.setNumThreads(1)  # there is a child for every core

    def ask(kind: str, value: Any) -> Any:
        try:
            line.send((kind, value))
            return line.recv()
        except (EOFError, OSError):
            os._exit(1)  # the parent was killed

    ask("started", None)
    try:
        kind, value = "done", function(job, ask)
    except StoppedError as error:
        kind, value = "stopped", str(error)
    except Exception as error:
        kind, value = "died", f"{type(error).__name__}: {error}"
    line.send((kind, value))


def run_on_ray(function: Function, jobs: Sequence[Any], *, limit_s: float, **_: Any) -> Iterator[tuple[int, Any]]:
    """As `run_jobs`, spread over a Ray cluster, one core per job; its other settings mean nothing here.

    Every machine of the cluster must reach the films and the folder of results: a shared disk, or an address such as
    ``s3://bucket/films``. A job still runs in a child process of its worker. UserError where ray is not installed.
    """
    try:
        import ray.data
    except ImportError:
        raise UserError("ray is not installed; run `pip install 'cinema[ray]'`, or leave --ray away") from None
    rows = [{"number": number, "job": pickle.dumps((function, job, limit_s))} for number, job in enumerate(jobs)]
    if not rows:
        return
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(_attend, num_cpus=1).iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, StoppedError):
            raise result
        yield row["number"], result


def _attend(row: dict[str, Any]) -> dict[str, Any]:
    """Do one job in a child of a Ray worker."""
    function, job, limit_s = pickle.loads(row["job"])
    try:
        ((_, result),) = run_jobs(function, [job], limit_s=limit_s)
    except StoppedError as error:
        result = error
    return {"number": row["number"], "result": pickle.dumps(result)}
