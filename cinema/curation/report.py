"""What came of curation, for people: a static page with every shot, and a data card, from the templates in `pages`.

File names, reasons and captions are data: all of them are escaped, and the pages allow neither scripts nor anything
from elsewhere.
"""

import base64
import io
import json
import os
import re
from bisect import bisect
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
from cinema.curation.store import read_done, read_film, read_images
from cinema.errors import UserError
from cinema.files import write_text
from cinema.story import TAG

BOUNDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between the bars of shot lengths
BARS = (f"under {BOUNDS[0]:g} s", *(f"{a:g} to {b:g} s" for a, b in pairwise(BOUNDS)), f"over {BOUNDS[-1]:g} s")
THUMB = 240  # pixels across a picture of the contact sheet
STRIP = 5  # pictures of a film on the first page
# What a film gives that failed.
NOTHING: dict[str, Any] = {"counts": {"frames": 0, "shots": 0, "kept": 0}, "lasts_s": 0.0, "page": "", "strip": []}


@dataclass(frozen=True)
class _Summary:
    """What the first page says of a film: seconds of every shot, why some are set aside, a few pictures."""

    lasts: list[float]
    reasons: list[str]
    strip: list[str]


def write_report(out: Path | str, workers: int = 1) -> Path:
    """Write pages for people about a folder of curation, UserError if it is none; returns the first, index.html."""
    folder = mirror(out) if isinstance(out, str) and is_remote(out) else Path(out)
    if not (done := _read_all(folder)):
        raise UserError(f"{out}: nothing was curated into this folder; name one that `cinema curate` wrote")
    jobs = [(folder, stem, film) for stem, film in done.items() if (folder / f"{stem}.parquet").is_file()]
    seen = {jobs[i][1]: s for i, s in run_jobs(_write_film_page, jobs, workers=workers) if not isinstance(s, Died)}
    lasts, reasons = [s for one in seen.values() for s in one.lasts], [r for one in seen.values() for r in one.reasons]
    pages = {stem: {"page": quote(os.fsencode(f"{stem}.html")), "strip": seen[stem].strip} for stem in seen}
    films = [film | pages.get(stem, {}) for stem, film in done.items()]
    page = folder / "report" / "index.html"
    _write(page, "index.html", title="Curated films", films=films, settings=_settings(films), **_charts(lasts, reasons))
    if folder != Path(out):
        send(folder, str(out), lambda path: path.parent.name == "report")
    return page


def write_card(out: Path) -> None:
    """Write `out`/README.md, the data card: what was made of what, how, and what is unknown."""
    if films := list(_read_all(out).values()):
        _write(out / "README.md", "card.md", films=films, settings=_settings(films))


def _write_film_page(job: tuple[Path, str, dict[str, Any]], ask: Ask) -> _Summary:
    """Write the page of one film, in a child."""
    out, stem, done = job
    film = read_film(out / f"{stem}.parquet", images=False)
    tags = dict.fromkeys(tag for shot in film.shots for tag in shot.tags)
    named = {tag: [shot for shot in film.shots if tag in shot.tags] for tag in tags}
    pictures = [_thumb(image) if image else "" for image in read_images(out / f"{stem}.parquet")]
    lasts, reasons = [s.end_s - s.start_s for s in film.shots], [s.reason for s in film.shots if not s.kept]
    about = {"title": film.film, "film": done, "median": median(lasts), **_charts(lasts, reasons)}
    about |= {"shots": film.shots, "cast": film.cast, "pictures": pictures, "named": named}
    _write(out / "report" / f"{stem}.html", "film.html", **about)
    strip = [picture for picture, shot in zip(pictures, film.shots, strict=True) if picture and shot.kept]
    some = min(STRIP, len(strip))
    return _Summary(lasts, reasons, [strip[i * len(strip) // some] for i in range(some)])


def _read_all(out: Path) -> dict[str, dict[str, Any]]:
    """The done-files of a folder by the stems of their films."""
    done = {path.name.removesuffix(".done.json"): read_done(path) for path in sorted(out.glob("*.done.json"))}
    return {stem: NOTHING | film for stem, film in done.items() if film}


def _settings(films: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Settings of a run; those inside others are named by both."""
    nested = ((key, value if isinstance(value, dict) else {"": value}) for key, value in films[0]["config"].items())
    return [(f"{key} {k}".strip().replace("_", " "), v) for key, values in nested for k, v in values.items()]


def _charts(lasts: Sequence[float], reasons: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """How many shots last how long, and how many are set aside why, where figures in a reason do not count."""
    lengths = Counter(BARS[bisect(BOUNDS, seconds)] for seconds in lasts)
    kinds = Counter(re.split(r" \(|: ", reason)[0] for reason in reasons)
    return {"lengths": [(bar, lengths[bar]) for bar in BARS], "rejections": kinds.most_common()}


def _thumb(image: bytes) -> str:
    """A small copy of a JPEG as a data: address."""
    picture, buffer = Image.open(io.BytesIO(image)), io.BytesIO()
    picture.draft("RGB", (THUMB, THUMB // 2))
    picture.thumbnail((THUMB, THUMB))
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table: nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", " ".join(str(value).split()))


def _write(path: Path, template: str, **content: Any) -> None:
    pages = jinja2.Environment(autoescape=jinja2.select_autoescape(), undefined=jinja2.StrictUndefined)
    pages.loader = jinja2.FileSystemLoader(Path(__file__).parent / "pages")
    pages.trim_blocks = pages.keep_trailing_newline = True
    pages.filters |= {"cell": _cell, "from_json": json.loads, "split_at_tags": re.compile(f"({TAG.pattern})").split}
    write_text(path, pages.get_template(template).render(**content))
