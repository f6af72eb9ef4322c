"""How well and how fast films are cut, by truth beside them: `a.cuts.csv`, or the `a.json` of a toy film.

A row `frame, type, start, end, score` of score 1 is a hard cut, to be found to the frame or next to it. What is found
within another's `start` to `end` does not count; whether a fade or dissolve there is called so is counted apart."""

import csv
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from fractions import Fraction
from multiprocessing import get_context
from operator import add
from pathlib import Path
from typing import Any

import av
import numpy as np
from scenedetect import ContentDetector, SceneManager, open_video
from scenedetect.output import save_images

from cinema.curation.film import probe
from cinema.curation.frames import find_borders
from cinema.curation.scan import scan_film
from cinema.curation.search import SUFFIXES
from cinema.curation.shots import DETECTOR, DETECTORS, Timeline, cut_film, unknown_detector
from cinema.errors import UserError
from cinema.progress import Progress, quiet
from cinema.toyworld.film import BLACK, OVERLAP, write_film
from cinema.toyworld.world import sample_movie

CODECS = {"libx264": ".mp4", "mpeg4": ".avi", "libvpx-vp9": ".webm"}
TRUTHS = (".cuts.csv", ".json")  # endings of what lies beside a film; the first counts
KEYFRAME = 400  # height of keyframes where speed is measured, the paper's


@dataclass(frozen=True)
class Event:
    """A row of truth: a transition at `frame`, going on from `start` to `end`; `score` as in the module's text."""

    frame: int
    kind: str
    start: int
    end: int
    score: int


@dataclass(frozen=True)
class Tally:
    """Hard cuts found, wrongly found and missed; fades and dissolves reported as such, of how many."""

    found: int = 0
    wrong: int = 0
    missed: int = 0
    named: int = 0
    gradual: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*map(add, astuple(self), astuple(other)))

    def figures(self) -> dict[str, float | int]:
        """Precision, recall, F1 and the share of transitions, 1 where there is nothing; and the counts."""
        shares = {"precision": (self.found, self.found + self.wrong), "recall": (self.found, self.found + self.missed)}
        shares["f1"] = 2 * self.found, 2 * self.found + self.wrong + self.missed
        shares["transitions"] = self.named, self.gradual
        return {name: a / b if b else 1.0 for name, (a, b) in shares.items()} | vars(self)


def read_truth(film: Path) -> tuple[list[Event], list[int]] | None:
    """A film's events, and its picture's left, top, right and bottom if the truth says so; None without a truth.

    Raises UserError where what lies beside the film is not readable.
    """
    table, sidecar = (film.with_suffix(ending) for ending in TRUTHS)
    source = sidecar
    try:
        toy = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}
        if not isinstance(toy, dict):
            raise TypeError("it holds no JSON object")
        area = [0, toy["bars"][0], int(toy["width"]), toy["height"] - toy["bars"][1]] if "bars" in toy else []
        if not table.is_file():
            return (_toy_events(toy), area) if sidecar.is_file() else None
        source, rows = table, csv.DictReader(table.read_text(encoding="utf-8").splitlines())
        numbers = ("start", "end", "score")
        return [Event(int(r["frame"]), r["type"], *(int(r[key]) for key in numbers)) for r in rows], area
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: not the truth about a film ({error}); correct it or move it away") from None


def _toy_events(truth: dict[str, Any]) -> list[Event]:
    reach = {"cut": (0, 0), "dissolve": (OVERLAP // 2 + 1, OVERLAP // 2), "fade": (OVERLAP + BLACK + 1, OVERLAP)}
    shots = [(shot["start_frame"], shot["transition"]) for shot in truth["shots"]]
    events = [Event(at, k, at - reach[k][0], at + reach[k][1], int(k == "cut")) for at, k in shots if at]
    cards = [at for at in truth["cuts"] if not any(e.start <= at <= e.end for e in events)]
    return events + [Event(at, "cut", at, at, 1) for at in cards]


def judge(shots: Sequence[tuple[int, str]], events: Sequence[Event]) -> Tally:
    """Compare where shots begin and how, the first one left out, with the truth."""
    free, hard = [at for at, _ in shots], [e for e in events if e.score == 1]
    for event in hard:
        if near := [at for at in free if abs(at - event.frame) <= 1]:
            free.remove(min(near, key=lambda at: abs(at - event.frame)))
    found, spans = len(shots) - len(free), {e: range(e.start - 1, e.end + 2) for e in events}
    wrong = [at for at in free if not any(at in span for span in spans.values())]
    gradual = [e for e in events if e.kind.startswith(("fade", "dissolve"))]
    left = [(at, kind) for at, kind in shots if at in free]
    named = [e for e in gradual if any(at in spans[e] and e.kind.startswith(kind) for at, kind in left)]
    return Tally(found, len(wrong), len(hard) - found, len(named), len(gradual))


def compare(films: Sequence[Path], detectors: Iterable[str], on_progress: Progress = quiet) -> dict[str, Any]:
    """Figures of every detector over all films that have truth, and of the borders of those that say theirs.

    Raises UserError where no film has truth, or a film or a truth is not readable.
    """
    known = [(film, truth) for film in films if (truth := read_truth(film)) is not None]
    if not known:
        raise UserError("no film has a NAME.cuts.csv or the toy world's NAME.json beside it; give a folder with one")
    tallies, off = dict.fromkeys(detectors, Tally()), list[int]()
    for i, (path, (events, area)) in enumerate(known):
        film = probe(path)
        picture = find_borders(film)
        off += [max(abs(a - b) for a, b in zip(astuple(picture), area, strict=True))] if area else []
        for name in tallies:
            shots = [(shot.start, shot.transition) for shot in cut_film(film, picture, name, Timeline())]
            tallies[name] += judge(shots[1:], events)
        on_progress(i + 1, len(known), path.name)
    borders = {"borders off by at most": max(off), "borders exact": off.count(0)} if off else {}
    return {"films": len(known), **borders, **{name: tally.figures() for name, tally in tallies.items()}}


def write_trials(count: int, seed: int, out: Path, on_progress: Progress = quiet, shots: int = 8) -> list[Path]:
    """Write toy films with all transitions, titles, letterbox, grain, three codecs and rate factors 18 to 32."""
    films = []
    for i in range(count):
        rng = random.Random(f"trial/{seed}/{i}")
        movie, (codec, ending) = sample_movie(f"trial/{seed}/{i}", shots), list(CODECS.items())[i % len(CODECS)]
        clean, path = out / f"trial-{seed}-{i:03d}-clean.mp4", out / f"trial-{seed}-{i:03d}{ending}"
        truth = write_film(movie, clean, crf=4, transitions=True, titles=True, letterbox=rng.choice((0, 12, 16, 22)))
        _roughen(clean, path, codec, rng.choice((0, 3, 6)), rng.randint(18, 32))
        truth.rename(path.with_suffix(".json"))
        clean.unlink()
        films.append(path)
        on_progress(i + 1, count, path.name)
    return films


def _roughen(film: Path, path: Path, codec: str, grain: int, crf: int) -> None:
    """Encode a film again, with grain of this standard deviation (of 255) on the luma of its picture area."""
    rng = np.random.default_rng(0)
    quality = {"qmin": str(crf // 5), "qmax": str(crf // 5)} if codec == "mpeg4" else {"crf": str(crf)}
    speed = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx-vp9" else {}
    with av.open(str(film)) as source, av.open(str(path), "w") as target:
        old = source.streams.video[0]
        rate = old.average_rate or Fraction(24)
        stream: Any = target.add_stream(codec, rate=rate, options=quality | speed)
        stream.width, stream.height, stream.pix_fmt = old.width, old.height, "yuv420p"
        for number, frame in enumerate(source.decode(old)):
            planes = frame.to_ndarray()
            luma = planes[: old.height].astype(float)
            noise = grain * rng.standard_normal(luma.shape) * (luma > 20)
            planes[: old.height] = np.clip(luma + noise, 16, 235).round()
            again = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            again.pts, again.time_base = number, Fraction(1) / rate
            target.mux(stream.encode(again))
        target.mux(stream.encode(None))


def _decode(film: Path) -> None:
    with av.open(str(film)) as container:
        container.streams.video[0].thread_count = 1
        deque(container.decode(video=0), maxlen=0)


def _scenedetect(film: Path, images: int) -> None:
    manager, video = SceneManager(), open_video(str(film))
    manager.add_detector(ContentDetector())
    manager.detect_scenes(video)
    with tempfile.TemporaryDirectory() as folder:
        save_images(manager.get_scene_list(start_in_scene=True), video, num_images=images, output_dir=folder)


WORK: dict[str, Callable[[Path], object]] = {
    "decode": _decode,
    "scan": lambda film: deque(scan_film(probe(film), KEYFRAME, DETECTOR, Timeline(), lambda *news: None), maxlen=0),
    "scenedetect, 1 image a shot": lambda film: _scenedetect(film, 1),
    "scenedetect, 3 images a shot": lambda film: _scenedetect(film, 3),
}


def _cost(name: str, film: Path) -> dict[str, float]:
    """CPU seconds of this process for a piece of WORK, and its largest memory so far in MiB."""
    began = time.process_time()
    WORK[name](film)
    return {"cpu seconds": time.process_time() - began, "peak MiB": _peak_bytes() / 2**20}


def _peak_bytes() -> int:
    """Of this process. Linux's `ru_maxrss` begins with the parent's, so its status file is asked first."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def measure(film: Path) -> dict[str, Any]:
    """CPU seconds (without start-up) and peak memory of all WORK, each in a process of its own, and their ratios."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        costs: dict[str, Any] = {name: pool.submit(_cost, name, film).result() for name in WORK}
    seconds = {name: cost["cpu seconds"] for name, cost in costs.items()}
    ratios = {f"scan / {name}": seconds["scan"] / s for name, s in seconds.items() if "scenedetect" in name}
    return costs | {"share of the speed of decoding": seconds["decode"] / seconds["scan"]} | ratios


def bench_curate(
    folder: Path | None, detectors: Sequence[str] = (), toy: int = 6, on_progress: Progress = quiet
) -> dict[str, Any]:
    """Compare detectors (all if empty) on a folder's films with truth beside them, and measure speed on its largest.

    Without a folder, `toy` films of the toy world are written, and forgotten afterwards. Raises UserError for an
    unknown detector, or without a readable film with truth.
    """
    if unknown := [name for name in detectors if name not in DETECTORS]:
        raise unknown_detector(unknown[0])
    if folder and not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give one with films and their NAME.cuts.csv")
    with tempfile.TemporaryDirectory(prefix="cinema-bench-") as scratch:
        written = write_trials(toy, 0, Path(scratch), on_progress) if folder is None else folder.iterdir()
        media = (p for p in sorted(written) if p.is_file() and p.suffix.lower() in SUFFIXES)
        films = [p for p in media if any(p.with_suffix(ending).is_file() for ending in TRUTHS)]
        figures = compare(films, detectors or DETECTORS, on_progress)
        return figures | {"speed": measure(max(films, key=lambda film: film.stat().st_size))}
