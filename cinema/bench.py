"""How well and how fast films are cut, by truth beside them: `a.cuts.csv`, or the `a.json` of a toy film.

A row `frame, type, start, end, score` of score 1 is a hard cut, to be found to the frame or next to it. What is found
within another's `start` to `end` does not count; whether a fade or dissolve there is called so is counted apart."""

import csv
import json
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from scenedetect import ContentDetector, detect, open_video
from scenedetect.output import save_images

from cinema.curation.film import Timeline, probe
from cinema.curation.frames import find_borders, scan_film
from cinema.curation.search import SUFFIXES
from cinema.curation.shots import DETECTOR, DETECTORS, cut_film
from cinema.errors import UserError
from cinema.progress import Progress, quiet
from cinema.toyworld.film import BLACK, OVERLAP

KEYFRAME = 400  # height of keyframes where speed is measured, the paper's


@dataclass(frozen=True)
class Event:
    """A row of truth: a transition at `frame`, going on from `start` to `end`; `score` as in the module's text."""

    frame: int
    kind: str
    start: int
    end: int
    score: int

    def covers(self, at: int) -> bool:
        """Whether it goes on in a frame, or next to it."""
        return self.start - 1 <= at <= self.end + 1


class Tally(NamedTuple):
    """Hard cuts found, wrongly found and missed; fades and dissolves reported as such, of how many."""

    found: int = 0
    wrong: int = 0
    missed: int = 0
    named: int = 0
    gradual: int = 0

    def figures(self) -> dict[str, float | int]:
        """F1 of hard cuts, 1 where there is nothing, and the counts."""
        cuts = 2 * self.found + self.wrong + self.missed
        return {"f1": 2 * self.found / cuts if cuts else 1.0} | self._asdict()


def read_truth(film: Path) -> tuple[list[Event], list[int]] | None:
    """A film's events, and its picture's left, top, right and bottom if the truth says so; None without a truth.

    Raises UserError where what lies beside the film is not readable.
    """
    table, source = film.with_suffix(".cuts.csv"), film.with_suffix(".json")
    try:
        toy = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
        bars = toy.get("bars")
        area = [0, bars[0], int(toy["width"]), toy["height"] - bars[1]] if bars else []
        if not table.is_file():
            return (_toy_events(toy), area) if source.is_file() else None
        source, numbers = table, ("start", "end", "score")
        rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
        return [Event(int(r["frame"]), r["type"], *(int(r[key]) for key in numbers)) for r in rows], area
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: not the truth about a film ({error}); correct it or move it away") from None


def _toy_events(truth: dict[str, Any]) -> list[Event]:
    reach = {"cut": (0, 0), "dissolve": (OVERLAP // 2 + 1, OVERLAP // 2), "fade": (OVERLAP + BLACK + 1, OVERLAP)}
    shots = [(shot["start_frame"], shot["transition"]) for shot in truth["shots"]]
    events = [Event(at, k, at - reach[k][0], at + reach[k][1], int(k == "cut")) for at, k in shots if at]
    cards = [Event(at, "cut", at, at, 1) for at in truth["cuts"]]
    return events + [card for card in cards if not any(e.start <= card.frame <= e.end for e in events)]


def judge(shots: Sequence[tuple[int, str]], events: Sequence[Event]) -> Tally:
    """Compare where shots begin and how, the first one left out, with the truth."""
    free, hard = dict(shots), [e for e in events if e.score == 1]
    for event in hard:
        if near := [at for at in free if abs(at - event.frame) <= 1]:
            del free[min(near, key=lambda at: abs(at - event.frame))]
    found, wrong = len(shots) - len(free), [at for at in free if not any(e.covers(at) for e in events)]
    gradual = [e for e in events if e.kind.startswith(("fade", "dissolve"))]
    named = [e for e in gradual if any(e.covers(at) and e.kind.startswith(kind) for at, kind in free.items())]
    return Tally(found, len(wrong), len(hard) - found, len(named), len(gradual))


def compare(films: Sequence[Path], detectors: Iterable[str], on_progress: Progress = quiet) -> dict[str, Any]:
    """Figures of every detector over all films that have truth, and of the borders of those that say theirs.

    Raises UserError where no film has truth, or a film or a truth is not readable.
    """
    known = [(film, truth) for film in films if (truth := read_truth(film)) is not None]
    if not known:
        raise UserError("no film has a NAME.cuts.csv or the toy world's NAME.json beside it; give a folder with one")
    tallies, off = {name: list[Tally]() for name in detectors}, list[int]()
    for i, (path, (events, area)) in enumerate(known):
        film = probe(path)
        picture = find_borders(film)
        off += [max(abs(a - b) for a, b in zip(picture, area, strict=True))] if area else []
        for name, tally in tallies.items():
            shots = [(shot.start, shot.transition) for shot in cut_film(film, picture, name, Timeline())]
            tally.append(judge(shots[1:], events))
        on_progress(i + 1, len(known), path.name)
    borders = {"borders off by at most": max(off), "borders exact": off.count(0)} if off else {}
    figures = {name: Tally(*np.sum(tally, axis=0).tolist()).figures() for name, tally in tallies.items()}
    return {"films": len(known)} | borders | figures


def _decode(film: Path) -> None:
    with av.open(str(film)) as container:
        container.streams.video[0].thread_count = 1
        deque(container.decode(video=0), maxlen=0)


def _scenedetect(film: Path, images: int) -> None:
    scenes = detect(str(film), ContentDetector(), start_in_scene=True)
    with tempfile.TemporaryDirectory() as folder:
        save_images(scenes, open_video(str(film)), num_images=images, output_dir=folder)


WORK: dict[str, Callable[[Path], object]] = {
    "decode": _decode,
    "scan": lambda film: deque(scan_film(probe(film), KEYFRAME, DETECTOR, Timeline(), lambda *news: None), maxlen=0),
    "scenedetect, 1 image a shot": partial(_scenedetect, images=1),
    "scenedetect, 3 images a shot": partial(_scenedetect, images=3),
}


def _cost(name: str, film: Path) -> dict[str, float]:
    """CPU seconds of this process for a piece of WORK, and its largest memory so far in MiB."""
    began = time.process_time()
    WORK[name](film)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"cpu seconds": time.process_time() - began, "peak MiB": peak}


def measure(film: Path) -> dict[str, Any]:
    """CPU seconds (without start-up) and peak memory of all WORK, each in a process of its own, and their ratios."""
    # Not "spawn": the peak of a spawned process begins with that of its parent.
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver"), max_tasks_per_child=1) as pool:
        costs: dict[str, Any] = {name: pool.submit(_cost, name, film).result() for name in WORK}
    seconds = {name: cost["cpu seconds"] for name, cost in costs.items()}
    ratios = {f"scan / {name}": seconds["scan"] / s for name, s in seconds.items() if "scenedetect" in name}
    return costs | {"share of the speed of decoding": seconds["decode"] / seconds["scan"]} | ratios


def bench_curate(folder: Path, on_progress: Progress = quiet) -> dict[str, Any]:
    """Compare all detectors on a folder's films with truth beside them, and measure speed on the largest of these.

    Raises UserError as `compare`.
    """
    films = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and read_truth(path)]
    figures = compare(films, DETECTORS, on_progress)
    return figures | {"speed": measure(max(films, key=lambda film: film.stat().st_size))}
