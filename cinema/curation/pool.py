"""Jobs in child processes, one each, so that a crash, a hang or a segmentation fault costs one job and not the run.

A child waits for an answer to everything that it says. So one whose parent was killed ends at its next message, and
one that says nothing for too long is known to hang.
"""

import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import cv2

from cinema.curation.store import StoppedError
from cinema.errors import UserError

TRIES = 2  # a crash may have been another's fault: memory taken away, a disk that was gone
CONTEXT: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
CONTEXT.set_forkserver_preload(["cinema.curation.run"])  # imported once, so a child starts in milliseconds
Ask = Callable[[str, Any], Any]  # (kind, value) -> the parent's answer
Function = Callable[[Any, Ask], Any]  # (job, ask) -> the job's result


@dataclass(frozen=True)
class Died:
    """The outcome of a job whose process crashed, hung or was killed at every try."""

    reason: str


class _Child:
    """A process that does one job; `line` is ready to read when it has something to say, or is dead."""

    def __init__(self, function: Function, job: Any, number: int, tries: int, limit_s: float):
        self.number, self.tries, self.deadline, self.why = number, tries, time.monotonic() + limit_s, ""
        self.line, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_main, args=(theirs, function, job), daemon=True)
        self.process.start()
        theirs.close()

    def end(self, grace_s: float = 0.0) -> str:
        """Kill it if it does not end by itself in `grace_s` seconds, and say how it ended."""
        self.process.join(grace_s)
        self.process.kill()
        self.process.join()
        self.line.close()
        how = {-one: one.name for one in signal.Signals}.get(self.process.exitcode, f"code {self.process.exitcode}")
        return self.why or f"its process ended with {how}" + " (out of memory?)" * (how == "SIGKILL")


def run_jobs(
    function: Function,
    jobs: Sequence[Any],
    *,
    workers: int = 1,
    limit_s: float = 900.0,
    answer: Callable[[int, str, Any], Any] = lambda number, kind, value: True,
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the job, what `function` returned or Died) in the order in which jobs end.

    Each job is a call `function(job, ask)` in a child, of which there are `workers` at a time; both must be picklable.
    A child that says nothing for `limit_s` seconds is killed. For every message `answer` is called here, as (number of
    the job, kind, value), and the child gets what it returns. Where a job raises StoppedError, no other is begun, and
    it is raised here when those under way have ended.
    """
    waiting, running = deque((number, 1) for number in range(len(jobs))), dict[Any, _Child]()
    stopped = None
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, tries = waiting.popleft()
                child = _Child(function, jobs[number], number, tries, limit_s)
                running[child.line] = child
            for child in [running[line] for line in wait(list(running), timeout=0.2)]:
                try:
                    kind, outcome = child.line.recv()
                    if kind != "done":
                        child.line.send(answer(child.number, kind, outcome))
                        child.deadline = time.monotonic() + limit_s
                        continue
                except (EOFError, OSError):
                    outcome = Died(child.end(grace_s=1.0))
                del running[child.line]
                child.end()
                if isinstance(outcome, StoppedError):
                    stopped = outcome
                    waiting.clear()
                elif not isinstance(outcome, Died):
                    yield child.number, outcome
                elif child.tries < TRIES:
                    waiting.appendleft((child.number, child.tries + 1))
                else:
                    yield child.number, Died(f"{outcome.reason}; it was tried {TRIES} times")
            for child in running.values():
                if child.deadline < time.monotonic():
                    child.why = f"its process showed no progress for {limit_s:g} s"
                    child.process.kill()  # which its line will tell
        if stopped:
            raise stopped
    finally:
        for child in running.values():
            child.end()


def _main(line: Connection, function: Function, job: Any) -> None:
    """What a child does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted as well, and ends us
    cv2.setNumThreads(1)  # there is a child for every core

    def ask(kind: str, value: Any) -> Any:
        try:
            line.send((kind, value))
            return line.recv()
        except (EOFError, OSError):
            os._exit(1)  # the parent was killed

    try:
        outcome = function(job, ask)
    except StoppedError as error:
        outcome = error
    except Exception as error:
        outcome = Died(f"{type(error).__name__}: {error}")
    line.send(("done", outcome))


def run_on_ray(function: Function, jobs: Sequence[Any], *, limit_s: float, **_: Any) -> Iterator[tuple[int, Any]]:
    """As `run_jobs`, spread over a Ray cluster, one core per job, each in a child of its worker.

    Every machine must reach the films and the folder of results: a shared disk, or an address such as
    ``s3://bucket/films``. Other settings mean nothing here. UserError where ray is not installed.
    """
    try:
        import ray.data
    except ImportError:
        raise UserError("ray is not installed; run `pip install 'cinema[ray]'`, or leave --ray away") from None
    items = [pickle.dumps((function, number, job, limit_s)) for number, job in enumerate(jobs)]
    for row in ray.data.from_items(items, override_num_blocks=len(items)).map(_attend, num_cpus=1).iter_rows():
        number, result = pickle.loads(row["item"])
        if isinstance(result, StoppedError):
            raise result
        yield number, result


def _attend(row: dict[str, Any]) -> dict[str, Any]:
    """Do one job in a child of a Ray worker."""
    function, number, job, limit_s = pickle.loads(row["item"])
    try:
        ((_, result),) = run_jobs(function, [job], limit_s=limit_s)
    except StoppedError as error:
        result = error
    return {"item": pickle.dumps((number, result))}
