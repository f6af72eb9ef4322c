"""What came of curation, for people: a static page with every shot, and a data card.

File names, reasons and captions are data: all of them are escaped, and the pages allow neither scripts nor anything
from elsewhere.
"""

import base64
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import jinja2
from PIL import Image

from cinema.curation.pool import Ask, Died, run_jobs
from cinema.curation.remote import is_remote, mirror, send
from cinema.curation.store import CuratedFilm, CuratedShot, read_done, read_film
from cinema.errors import UserError
from cinema.files import write_text
from cinema.story import TAG

BOUNDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between the bars of shot lengths
THUMB = 240  # pixels across a picture of the contact sheet
STRIP = 5  # pictures of a film on the first page


@dataclass(frozen=True)
class _Summary:
    """What the first page says of a film."""

    lengths: Counter[int]  # number of a bar -> shots
    reasons: Counter[str]
    strip: list[str]


def write_report(out: Path | str, workers: int = 1) -> Path:
    """Write pages for people about a folder of curation; returns the first, report/index.html.

    Raises:
        UserError: `out` holds nothing of curation.
    """
    folder = mirror(out) if isinstance(out, str) and is_remote(out) else Path(out)
    done = {path.name.removesuffix(".done.json"): read_done(path) for path in sorted(folder.glob("*.done.json"))}
    if not done:
        raise UserError(f"{out}: nothing was curated into this folder; name one that `cinema curate` wrote")
    jobs = [(folder, stem) for stem in done if (folder / f"{stem}.parquet").is_file()]
    seen = {jobs[i][1]: s for i, s in run_jobs(_write_film_page, jobs, workers=workers) if not isinstance(s, Died)}
    page = folder / "report" / "index.html"
    _write_page(page, "index.html", **_index(done, seen))
    if folder != Path(out):
        send(folder, str(out), lambda path: path.parent.name == "report")
    return page


def write_card(out: Path) -> None:
    """Write `out`/README.md, the data card: what was made of what, how, and what is unknown."""
    if done := [one for path in sorted(out.glob("*.done.json")) if (one := read_done(path))]:
        films = "\n".join(f"| {_cell(d['film'])} | {d['status']} | {_cell(d['reason'])} |" for d in done)
        config = "\n".join(f"- {_cell(key)}: {_cell(value)}" for key, value in _flat(done[0]["config"]))
        versions = ", ".join(f"{name} {number}" for name, number in done[0]["versions"].items())
        write_text(out / "README.md", CARD.format(**_totals(done), films=films, config=config, versions=versions))


CARD = """\
---
license: unknown
---

# Keyframes and captions of {films_} films

Made by `cinema curate`: a Parquet file per film, a row per shot in the order of the film. A row holds where the shot
begins and ends, the picture area, the middle frame as JPEG, its caption, the characters named in it, and whether the
shot is fit for training (`kept`) or why not (`reason`).

{hours:.2f} hours of film, {frames} frames, {shots} shots, of them {kept} kept; {failed} films could not be read.

## Licence and origin

**Unknown.** Curation does not know who owns the films or what their licences allow. Pictures of a film are under the
film's licence: whoever shares this folder has to find it out and write it here.

## Known limits

Cuts are found by a detector and captions may be written by a model: both are wrong at times, nobody has checked every
row. People may be recognisable. Names are those of the character bank that was given.

## Settings

{config}
- versions: {versions}

## Films

| film | status | what is missing |
|---|---|---|
{films}
"""


def _write_film_page(job: tuple[Path, str], ask: Ask) -> _Summary:
    """Write the page of one film, in a child."""
    out, stem = job
    film, done = read_film(out / f"{stem}.parquet"), read_done(out / f"{stem}.done.json")
    lasts = [shot.end_s - shot.start_s for shot in film.shots]
    lengths = Counter(sum(seconds >= bound for bound in BOUNDS) for seconds in lasts)
    reasons = Counter(_kind(shot.reason) for shot in film.shots if not shot.kept)
    rows = [_row(shot) for shot in film.shots]
    page = {"title": film.film, "name": film.film, "status": done["status"], "reason": done["reason"]}
    page |= {"figures_": [*_figures(_totals([done]))[1:], (f"{median(lasts):.1f} s", "median shot")]}
    page |= {"rows": rows, "names": _names(film), **_charts(lengths, reasons)}
    _write_page(out / "report" / f"{stem}.html", "film.html", **page)
    seen = [row["picture"] for row in rows if row["picture"] and row["kept"]]
    return _Summary(lengths, reasons, seen[:: max(1, len(seen) // STRIP)][:STRIP])


def _index(done: dict[str, dict[str, Any]], seen: dict[str, _Summary]) -> dict[str, Any]:
    """What the first page shows."""
    films = []
    for stem, d in done.items():
        film = {"name": d["film"], "status": d["status"], "reason": d["reason"], "shots": 0, "kept": 0}
        film |= d.get("counts", {}) | {"length": _clock(d.get("lasts_s", 0.0))}
        page = {"page": quote(f"{stem}.html"), "strip": seen[stem].strip} if stem in seen else {"page": "", "strip": []}
        films.append(film | page)
    lengths = sum((s.lengths for s in seen.values()), Counter[int]())
    reasons = sum((s.reasons for s in seen.values()), Counter[str]())
    settings = " · ".join(f"{key} {value}" for key, value in _flat(next(iter(done.values()))["config"]))
    index: dict[str, Any] = {
        "title": "Curated films",
        "settings": settings,
        "films": films,
        **_charts(lengths, reasons),
    }
    return index | {"figures_": _figures(_totals(list(done.values())))}


def _totals(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = [d.get("counts", {}) for d in done]
    sums = {key: sum(c.get(key, 0) for c in counts) for key in ("frames", "shots", "kept")}
    hours = sum(d.get("lasts_s", 0.0) for d in done) / 3600
    return sums | {"films_": len(done), "hours": hours, "failed": sum(d["status"] == "failed" for d in done)}


def _figures(totals: dict[str, Any]) -> list[tuple[str, str]]:
    names = {"films_": "films", "failed": "failed", "frames": "frames", "shots": "shots", "kept": "kept"}
    figures = [(f"{totals[key]:,}", name) for key, name in names.items() if key != "failed" or totals["films_"] > 1]
    return [figures[0], (_clock(totals["hours"] * 3600), "of film"), *figures[1:]]


def _row(shot: CuratedShot) -> dict[str, Any]:
    caption = [(text, bool(TAG.fullmatch(text))) for text in re.split(f"({TAG.pattern})", shot.caption) if text]
    row = {"number": shot.shot, "at": _clock(shot.start_s), "lasts": f"{shot.end_s - shot.start_s:.2f}"}
    row |= {"picture": _thumb(shot.image) if shot.image else "", "caption": caption}
    return row | {"kept": shot.kept, "reason": shot.reason}


def _names(film: CuratedFilm) -> list[tuple[str, str, int, list[tuple[float, float]]]]:
    """(tag, look, shots, their places in thousandths of the film) of everybody who is named, in order of appearance."""
    looks = {c.tag: c.description for c in film.cast}
    begin, end = film.shots[0].start_s, film.shots[-1].end_s
    scale, rows = 1000 / max(1e-6, end - begin), []
    for tag in dict.fromkeys(tag for shot in film.shots for tag in shot.tags):
        shots = [s for s in film.shots if tag in s.tags]
        spans = [(round((s.start_s - begin) * scale, 2), round((s.end_s - s.start_s) * scale, 2)) for s in shots]
        rows.append((tag, looks.get(tag, ""), len(shots), spans))
    return rows


def _charts(lengths: Counter[int], reasons: Counter[str]) -> dict[str, list[tuple[str, int, float]]]:
    names = [f"under {BOUNDS[0]:g} s", *(f"{a:g} to {b:g} s" for a, b in pairwise(BOUNDS)), f"over {BOUNDS[-1]:g} s"]
    bars = _bars([(name, lengths[i]) for i, name in enumerate(names)])
    return {"lengths": bars, "rejections": _bars(reasons.most_common())}


def _bars(counts: Sequence[tuple[str, int]]) -> list[tuple[str, int, float]]:
    """(name, count, percent of the longest bar)."""
    most = max((count for _, count in counts), default=0) or 1
    return [(name, count, round(100 * count / most, 1)) for name, count in counts]


def _kind(reason: str) -> str:
    """A reason without its figures, so that alike ones are counted together."""
    return reason.partition(" (")[0].partition(": ")[0]


def _thumb(image: bytes) -> str:
    """A small copy of a JPEG as a data: address."""
    picture = Image.open(io.BytesIO(image))
    picture.draft("RGB", (THUMB, THUMB // 2))
    picture.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _flat(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """Settings, those inside others named by both."""
    rows = []
    for key, value in settings.items():
        rows += [(f"{key} {k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)]
    return [(key.replace("_", " "), value) for key, value in rows]


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table: nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", " ".join(str(value).split()))


def _write_page(path: Path, template: str, **content: Any) -> None:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "pages")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    write_text(path, pages.get_template(template).render(**content))
