"""The run: films in, Parquet files out; what is finished is skipped, what is broken is named and costs only itself."""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cinema.config import preset
from cinema.curation.annotate import FAULTS, Annotator, Desk
from cinema.curation.clips import FOLDER as CLIPS
from cinema.curation.clips import write_clips
from cinema.curation.cluster import run_on_ray
from cinema.curation.film import Film, probe
from cinema.curation.pool import Ask, Died, run_jobs
from cinema.curation.remote import fetched, incoming, is_remote, mirror, opened, send
from cinema.curation.report import write_card
from cinema.curation.scan import Scan, scan_film
from cinema.curation.search import lengths
from cinema.curation.shots import DETECTOR, DETECTORS, SHORTEST_SHOT
from cinema.curation.store import (
    STORE_VERSION,
    CuratedFilm,
    CuratedShot,
    StoppedError,
    drop_scan,
    fingerprint,
    read_done,
    read_scan,
    write_done,
    write_film,
    write_scan,
)
from cinema.errors import UserError

TOLERANCE_S = 0.5  # by how much a film may end before its stated length and still count as whole
LIMIT_S = 900.0
PACKAGES = ("av", "scenedetect-headless", "pillow", "pyarrow")


@dataclass(frozen=True)
class FilmReport:
    """What became of one film, and why.

    "ok", "partial" (used, but some of it is missing or broken), "failed", or "waiting" if the run stopped before it.
    """

    film: Path | str
    status: str
    shots: int = 0  # rows written
    kept: int = 0  # those fit for training
    reason: str = ""  # of partial and failed, one sentence
    skipped: bool = False  # an earlier run had finished it


@dataclass(frozen=True)
class CurationReport:
    """What became of all films, in the order given, and what was spent on captions."""

    films: list[FilmReport]
    out_of_money: bool = False  # the spending limit ended the run
    requests: int = 0
    tokens: int = 0

    @property
    def failed(self) -> list[FilmReport]:
        """Films that gave nothing."""
        return [f for f in self.films if f.status == "failed"]


@dataclass(frozen=True)
class _Job:
    """A film and everything that a child process needs to know."""

    film: Path
    out: Path
    settings: dict[str, Any]
    options: dict[str, Any]  # of `curate_film`, which makes the settings of them
    source: str  # address to fetch the film from, or empty
    address: str  # address to send results to, or empty


def curate(
    films: Sequence[Path | str],
    out: Path | str,
    *,
    annotator: Annotator,
    height: int | None = None,
    detector: str = DETECTOR,
    video: bool = False,
    workers: int = 1,
    limit_s: float = LIMIT_S,
    max_requests: int | None = None,
    max_tokens: int | None = None,
    ray: bool = False,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> CurationReport:
    """Curate films into a folder; the same command goes on where it was killed and ends with the same bytes.

    Every film is curated by a child process. One that crashes or hangs is tried twice; then the film is set aside as
    failed, and not tried again until it changes or its done-file is deleted.

    Args:
        films: film files, each with a name of its own, here or at addresses such as "s3://bucket/a.mp4";
            `search.find_films` finds them in folders.
        out: folder for `<film stem>.parquet` and `<film stem>.done.json`, here or at an address.
        annotator: writes the captions.
        height: short side of keyframes in pixels; the preset's if None. They are twice as wide.
        detector: one of `shots.DETECTORS`.
        video: also write the shots as videos, `clips/<film stem>.tar`.
        workers: films at a time; a core each.
        limit_s: seconds without any progress after which a film's process is taken to hang.
        max_requests: requests that this run may send for captions; then it stops, and keeps what it has.
        max_tokens: tokens that this run may pay for, likewise; answers under way may exceed it by their own length.
        ray: spread the films over a Ray cluster instead; `workers` then does not count.
        on_progress: told (frames done, frames in all, what is happening and how fast).

    Raises:
        UserError: no film, two of one name, a wrong setting, or `out` was made with other settings.
        StoppedError: the run cannot go on: nothing can be written, or the annotator's server is not there.
    """
    address = str(out) if is_remote(str(out)) else ""
    sources = {incoming(str(f)) if is_remote(str(f)) else Path(f): str(f) for f in films}
    if ray and (max_requests is not None or max_tokens is not None):
        raise UserError("a spending limit cannot be kept on a Ray cluster; leave away --ray or the limit")
    settings, out = _settings(annotator, height, detector, video), mirror(address) if address else Path(out)
    _check(list(sources), out, settings)
    before = {film: _finished(film, out, _about(film, settings, source)) for film, source in sources.items()}
    todo = [film for film, report in before.items() if not report]
    options = {"annotator": annotator, "height": height, "detector": detector, "video": video}
    jobs = [_Job(film, out, settings, options, sources[film], address) for film in todo]
    tally = _Tally(todo, lengths(todo), on_progress, _Purse(max_requests, max_tokens))
    how: dict[str, Any] = {"workers": workers, "answer": tally.answer, "go_on": lambda: not tally.purse.empty}
    after = _work(jobs, tally, (run_on_ray if ray else run_jobs)(_curate, jobs, limit_s=limit_s, **how))
    write_card(out)
    if address:
        send(out, address)
    reports = [before[film] or after[film] for film in sources]
    told = [replace(r, film=s) if is_remote(s) else r for r, s in zip(reports, sources.values(), strict=True)]
    return CurationReport(told, tally.purse.empty, tally.purse.requests, tally.purse.tokens)


def _work(jobs: list[_Job], tally: "_Tally", running: Any) -> dict[Path, FilmReport]:
    """Have all jobs done; a film that was not begun waits."""
    not_begun = "not begun: the spending limit was reached before"
    reports = {job.film: FilmReport(job.film, "waiting", reason=not_begun) for job in jobs}
    with contextlib.closing(running):
        for number, result in running:
            job = jobs[number]
            report = _failed(job, result.reason, quarantined=True) if isinstance(result, Died) else result
            reports[job.film] = report
            tally.tell(number, 1.0, report.reason or report.status)
    return reports


def curate_film(
    film: Path,
    out: Path,
    *,
    annotator: Annotator,
    height: int | None = None,
    detector: str = DETECTOR,
    video: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
    desk: Desk | None = None,
) -> FilmReport:
    """Curate one film in this process; as `curate`, but what is wrong with the film is raised as UserError.

    `on_progress` is told the share done, 0 to 1, and what is happening; `desk` says whether captions may be paid for.
    """
    settings, tell = _settings(annotator, height, detector, video), on_progress or (lambda share, message: None)
    parquet, done_file = out / f"{film.stem}.parquet", out / f"{film.stem}.done.json"
    half = re.compile(rf"\.\.?{re.escape(film.stem)}(\.done|\.scan)?\.part\d+\.\w+")
    for stale in (*out.glob(".*.part*"), *(out / CLIPS).glob(".*.part*")):  # of a run that was killed while writing
        if half.fullmatch(stale.name):
            stale.unlink(missing_ok=True)
    about = _about(film, settings)
    if report := _finished(film, out, about):
        drop_scan(out, film.stem)
        return report
    facts = probe(film)
    cast = annotator.cast(film)  # before the work: it may say that there is none
    if (scan := read_scan(out, film.stem, about, Scan)) is None:
        looks = 0.5 if video else 0.9  # share of the work
        scan = scan_film(facts, settings["height"], detector, lambda share, message: tell(looks * share, message))
        if video:
            write_clips(facts, scan.rows, out, lambda share: tell(0.5 + 0.4 * share, "videos of shots"))
        if annotator.costly:
            write_scan(out, film.stem, about, scan)
    rows, asked = list(scan.rows), [row for row in scan.rows if row.kept]
    desk = replace(desk or Desk(), tell=lambda share: tell(0.9 + 0.1 * share, "captions"))
    captions = annotator.caption(film, asked, replace(desk, journal=out / f"{film.stem}.captions.jsonl"))
    for row, c in zip(asked, captions, strict=True):
        rows[row.shot] = replace(row, caption=c.text, tags=c.tags, kept=c.kept, reason=c.reason)
    write_film(parquet, CuratedFilm(shown(film.name), cast, rows))
    done = about | _verdict(facts, scan, rows, pending=sum(c.retry for c in captions))
    write_done(done_file, done)
    if not done["counts"]["pending"]:
        drop_scan(out, film.stem)
    return FilmReport(film, done["status"], len(rows), done["counts"]["kept"], done["reason"])


def shown(name: str) -> str:
    """A file name as text for a person, in one line; bytes that are no UTF-8 become escapes."""
    return " ".join(os.fsencode(name).decode(errors="backslashreplace").split())


def _curate(job: _Job, ask: Ask) -> FilmReport:
    """Curate one film, in a child."""
    told: list[Any] = [-1.0, "", 0.0]  # share, message, when

    def tell(share: float, message: str) -> None:
        now = time.monotonic()
        if message != told[1] or share >= told[0] + 0.005 or now > told[2] + 5:
            told[:] = share, message, now
            ask("progress", (share, message))

    try:
        desk = Desk(may_ask=lambda: ask("request", 1), spent=lambda tokens: ask("tokens", tokens))
        with fetched(job.source, job.film) if is_remote(job.source) else contextlib.nullcontext():
            report = curate_film(job.film, job.out, **job.options, on_progress=tell, desk=desk)
    except StoppedError:
        raise
    except UserError as error:
        report = _failed(job, str(error))
    if job.address:
        tell(1.0, "sending")
        send(job.out, job.address, lambda path: path.name.startswith(f"{job.film.stem}."))
    return report


@dataclass
class _Purse:
    """What a run may spend on captions; no limit if None."""

    max_requests: int | None
    max_tokens: int | None
    requests: int = 0
    tokens: int = 0
    empty: bool = False  # something was refused

    def may_ask(self) -> bool:
        """Pay for one more request, if there is enough."""
        self.empty |= self.max_requests is not None and self.requests >= self.max_requests
        self.empty |= self.max_tokens is not None and self.tokens >= self.max_tokens
        self.requests += not self.empty
        return not self.empty


@dataclass
class _Tally:
    """How far all films are, and how fast it goes."""

    films: list[Path]
    sizes: list[tuple[int, float]]  # frames and seconds of every film
    on_progress: Callable[[int, int, str], None] | None
    purse: "_Purse"
    shares: dict[int, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def answer(self, number: int, kind: str, value: Any) -> Any:
        """Hear what a child has to say."""
        if kind == "progress":
            self.tell(number, *value)
        elif kind == "request":
            return self.purse.may_ask()
        elif kind == "tokens":
            self.purse.tokens += value
        return True

    def tell(self, number: int, share: float, message: str) -> None:
        """Pass on how far a film is; a second try does not count back."""
        self.shares[number] = max(share, self.shares.get(number, 0.0))
        if self.on_progress:
            done = sum(int(share * self.sizes[i][0]) for i, share in self.shares.items())
            text = f"{shown(self.films[number].name)}: {message} · {self.speed():.1f} film-hours an hour"
            self.on_progress(done, sum(frames for frames, _ in self.sizes), text)

    def speed(self) -> float:
        """Film-hours an hour in this run."""
        seconds = sum(share * self.sizes[i][1] for i, share in self.shares.items())
        return seconds / max(1e-3, time.monotonic() - self.began)


def _finished(film: Path, out: Path, about: dict[str, Any]) -> FilmReport | None:
    """What an earlier run left of a film, if there is nothing more to do."""
    done = read_done(out / f"{film.stem}.done.json")
    if any(done.get(key) != about[key] for key in ("config_hash", "fingerprint")):
        return None
    if done["status"] == "failed":
        same = done.get("quarantined") and done["versions"] == about["versions"]
        return FilmReport(film, "failed", reason=done["reason"], skipped=True) if same else None
    counts = done["counts"]
    if counts["pending"] or not (out / f"{film.stem}.parquet").is_file():
        return None
    return FilmReport(film, done["status"], counts["shots"], counts["kept"], done["reason"], skipped=True)


def _verdict(film: Film, scan: Scan, rows: list[CuratedShot], pending: int) -> dict[str, Any]:
    """The part of a done-file that says how it went; `pending` captions are missing for a reason that may pass."""
    reasons = []
    if film.duration_s is not None and scan.lasts_s < film.duration_s - TOLERANCE_S:
        reasons.append(f"it ends after {scan.lasts_s:.2f} s of {film.duration_s:.2f} s")
    if scan.errors or scan.damaged:
        reasons.append(f"{scan.errors} packets and {scan.damaged} frames are damaged")
    if pending:
        reasons.append(f"{pending} captions are missing because of the server or the spending limit")
    counts = {"frames": scan.frames, "damaged_frames": scan.damaged, "errors": scan.errors, "pending": pending}
    counts |= {fault.lower(): sum(row.reason.startswith(f"{fault}: ") for row in rows) for fault in FAULTS}
    return {
        "status": "partial" if reasons else "ok",
        "reason": "; ".join(reasons),
        "counts": counts | {"shots": len(rows), "kept": sum(row.kept for row in rows)},
        "last_pts_s": scan.last_pts_s,
        "lasts_s": scan.lasts_s,
        "duration_s": film.duration_s,
    }


def _about(film: Path, settings: dict[str, Any], source: str = "") -> dict[str, Any]:
    """The part of a done-file that says what was asked, and of whom."""
    versions = {name: version(name) for name in PACKAGES}
    about = {"film": shown(film.name), "config_hash": _hash(settings), "config": settings, "versions": versions}
    try:
        with opened(source) if is_remote(source) else open(film, "rb") as file:
            return about | {"fingerprint": fingerprint(file)}
    except (OSError, UserError):  # missing, or not to be read: whoever opens it next will say so
        return about | {"fingerprint": ""}


def _failed(job: _Job, reason: str, quarantined: bool = False) -> FilmReport:
    done_file, reason = job.out / f"{job.film.stem}.done.json", shown(reason)
    if quarantined:
        reason += f"; delete {shown(done_file.name)} to have it tried again"
    if read_done(done_file).get("status", "failed") == "failed":  # else an earlier run saved something: leave it
        verdict = {"status": "failed", "reason": reason, "quarantined": quarantined}
        write_done(done_file, _about(job.film, job.settings, job.source) | verdict)
    return FilmReport(job.film, "failed", reason=reason)


def _settings(annotator: Annotator, height: int | None, detector: str, video: bool) -> dict[str, Any]:
    height = preset().keyframes.height if height is None else height
    if not 16 <= height <= 4096:
        raise UserError(f"a keyframe height of {height} makes no sense; choose 16 to 4096 pixels")
    if detector not in DETECTORS:
        raise UserError(f"there is no detector {detector!r}; choose one of {', '.join(DETECTORS)}")
    cuts = {"detector": detector, "shortest_shot_s": SHORTEST_SHOT, "video": video}
    return {"store_version": STORE_VERSION, "height": height, **cuts, "annotator": dict(annotator.identity)}


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _check(films: Sequence[Path], out: Path, settings: dict[str, Any]) -> None:
    if not films:
        raise UserError("there is no film to curate; name at least one file")
    seen: dict[str, Path] = {}
    for film in films:
        if (other := seen.setdefault(film.stem, film)) is not film:
            raise UserError(f"{other} and {film} would both become {film.stem}.parquet; rename one of them")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, not a folder; choose another folder for the results")
    for path in out.glob("*.done.json"):
        if read_done(path).get("config_hash", _hash(settings)) != _hash(settings):
            raise UserError(f"{out}: holds films curated with other settings; choose an empty folder or delete it")
