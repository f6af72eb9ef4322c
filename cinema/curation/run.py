"""The run: films in, Parquet files out; what is finished is skipped, what is broken is named and costs only itself."""

import glob
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cinema.config import preset
from cinema.curation.annotate import Annotator
from cinema.curation.film import Film, probe
from cinema.curation.scan import Scan, scan_film
from cinema.curation.shots import DETECTOR, DETECTORS, SHORTEST_SHOT
from cinema.curation.store import (
    STORE_VERSION,
    CuratedFilm,
    CuratedShot,
    StoppedError,
    fingerprint,
    read_done,
    write_done,
    write_film,
)
from cinema.errors import UserError

TOLERANCE_S = 0.5  # by how much a film may end before its stated length and still count as whole
PACKAGES = ("av", "scenedetect-headless", "pillow", "pyarrow")


@dataclass(frozen=True)
class FilmReport:
    """What became of one film: "ok", "partial" (used, but some of it is missing or broken) or "failed", and why."""

    film: Path
    status: str
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


def curate(
    films: Sequence[Path],
    out: Path,
    *,
    annotator: Annotator,
    height: int | None = None,
    detector: str = DETECTOR,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> CurationReport:
    """Curate films into a folder; the same command goes on where it was killed and ends with the same bytes.

    Args:
        films: film files, each with a name of its own.
        out: folder for `<film stem>.parquet` and `<film stem>.done.json`.
        annotator: writes the captions.
        height: short side of keyframes in pixels; the preset's if None. They are twice as wide.
        detector: one of `shots.DETECTORS`.
        on_progress: told (frames done, frames in all, what is happening).

    Raises:
        UserError: no film, two of one name, a wrong setting, or `out` was made with other settings.
        StoppedError: the run cannot go on: nothing can be written, or the annotator's server is not there.
    """
    films = list(dict.fromkeys(Path(f) for f in films))
    settings = _settings(annotator, height, detector)
    _check(films, out, settings)
    sizes = [_expected_frames(film) for film in films]
    reports: list[FilmReport] = []
    for i, film in enumerate(films):

        def tell(share: float, message: str, i: int = i) -> None:
            if on_progress:
                on_progress(sum(sizes[:i]) + int(share * sizes[i]), sum(sizes), f"{films[i].name}: {message}")

        try:
            report = curate_film(film, out, annotator=annotator, height=height, detector=detector, on_progress=tell)
        except StoppedError:
            raise
        except UserError as error:
            report = _failed(film, out, settings, str(error))
        reports.append(report)
        tell(1.0, "finished before" if report.skipped else report.reason or report.status)
    return CurationReport(reports)


def curate_film(
    film: Path,
    out: Path,
    *,
    annotator: Annotator,
    height: int | None = None,
    detector: str = DETECTOR,
    on_progress: Callable[[float, str], None] | None = None,
) -> FilmReport:
    """Curate one film; as `curate`, but what is wrong with the film is raised as UserError.

    `on_progress` is told the share done, 0 to 1, and what is happening.
    """
    settings, tell = _settings(annotator, height, detector), on_progress or (lambda share, message: None)
    facts, about = probe(film), _about(film, settings) | {"fingerprint": fingerprint(film)}
    parquet, done_file = out / f"{film.stem}.parquet", out / f"{film.stem}.done.json"
    done = read_done(done_file)
    finished = done.get("status") in ("ok", "partial") and not done["counts"]["pending"]
    if parquet.is_file() and finished and all(done[key] == about[key] for key in ("config_hash", "fingerprint")):
        counts = done["counts"]
        return FilmReport(film, done["status"], counts["shots"], counts["kept"], done["reason"], skipped=True)
    for stale in out.glob(f".{glob.escape(film.stem)}.*part*"):  # of a run that was killed while writing
        stale.unlink()
    scan = scan_film(facts, settings["height"], detector, lambda share, message: tell(0.9 * share, message))
    tell(0.9, "captions")
    rows, asked = list(scan.rows), [row for row in scan.rows if row.kept]
    captions = annotator.caption(film, asked)
    for row, c in zip(asked, captions, strict=True):
        rows[row.shot] = replace(row, caption=c.text, tags=c.tags, kept=c.kept, reason=c.reason)
    write_film(parquet, CuratedFilm(film.name, annotator.cast(film), rows))
    done = about | _verdict(facts, scan, rows, pending=sum(c.retry for c in captions))
    write_done(done_file, done)
    return FilmReport(film, done["status"], len(rows), done["counts"]["kept"], done["reason"])


def _verdict(film: Film, scan: Scan, rows: list[CuratedShot], pending: int) -> dict[str, Any]:
    """The part of a done-file that says how it went; `pending` captions are missing for a reason that may pass."""
    reasons = []
    if film.duration_s is not None and scan.lasts_s < film.duration_s - TOLERANCE_S:
        reasons.append(f"it ends after {scan.lasts_s:.2f} s of {film.duration_s:.2f} s")
    if scan.errors or scan.damaged:
        reasons.append(f"{scan.errors} packets and {scan.damaged} frames are damaged")
    if pending:
        reasons.append(f"{pending} captions are missing because of the server")
    counts = {"frames": scan.frames, "damaged_frames": scan.damaged, "errors": scan.errors, "pending": pending}
    return {
        "status": "partial" if reasons else "ok",
        "reason": "; ".join(reasons),
        "counts": counts | {"shots": len(rows), "kept": sum(row.kept for row in rows)},
        "last_pts_s": scan.last_pts_s,
        "lasts_s": scan.lasts_s,
        "duration_s": film.duration_s,
    }


def _about(film: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a done-file that says what was asked, and of whom."""
    versions = {name: version(name) for name in PACKAGES}
    return {"film": film.name, "config_hash": _hash(settings), "config": settings, "versions": versions}


def _failed(film: Path, out: Path, settings: dict[str, Any], reason: str) -> FilmReport:
    done_file = out / f"{film.stem}.done.json"
    if read_done(done_file).get("status", "failed") == "failed":  # else an earlier run saved something: leave it
        write_done(done_file, _about(film, settings) | {"status": "failed", "reason": reason})
    return FilmReport(film, "failed", reason=reason)


def _settings(annotator: Annotator, height: int | None, detector: str) -> dict[str, Any]:
    height = preset().keyframes.height if height is None else height
    if not 16 <= height <= 4096:
        raise UserError(f"a keyframe height of {height} makes no sense; choose 16 to 4096 pixels")
    if detector not in DETECTORS:
        raise UserError(f"there is no detector {detector!r}; choose one of {', '.join(DETECTORS)}")
    cuts = {"detector": detector, "shortest_shot_s": SHORTEST_SHOT}
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


def _expected_frames(film: Path) -> int:
    try:
        return probe(film).expected_frames
    except UserError:
        return 1
