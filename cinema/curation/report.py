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
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from PIL import Image

from cinema.curation.remote import is_remote, mirror, send
from cinema.curation.store import read_all_done, read_film, read_rows
from cinema.errors import UserError
from cinema.files import write_text
from cinema.story import TAG

BOUNDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between the bars of shot lengths
THUMB = 240  # pixels across a picture of the contact sheet


def write_report(out: Path | str) -> Path:
    """Write pages for people about a folder of curation, UserError if it is none; returns the first, index.html."""
    folder = mirror(out) if isinstance(out, str) and is_remote(out) else Path(out)
    if not (done := read_all_done(folder)):
        raise UserError(f"{out}: nothing was curated into this folder; name one that `cinema curate` wrote")
    whole = {stem: film for stem, film in done.items() if (folder / f"{stem}.parquet").is_file()}
    pages = {stem: _write_film_page(folder, stem, film) for stem, film in whole.items()}
    lasts, reasons = ([one for page in pages.values() for one in page[name]] for name in ("lasts", "reasons"))
    films = [{"page": ""} | film | pages.get(stem, {}) for stem, film in done.items()]
    page = folder / "report" / "index.html"
    write_page(page, "index.html", title="Curated films", films=films, **_charts(lasts, reasons))
    if folder != Path(out):
        send(folder, str(out), "report/**/*.html")
    return page


def write_card(out: Path) -> None:
    """Write `out`/README.md, the data card: what was made of what, how, and what is unknown."""
    if films := list(read_all_done(out).values()):
        write_page(out / "README.md", "card.md", films=films)


def _write_film_page(out: Path, stem: str, done: dict[str, Any]) -> dict[str, Any]:
    """Write the page of one film: its address, seconds of every shot, why some are set aside."""
    film = read_film(out / f"{stem}.parquet", images=False)
    tags = dict.fromkeys(tag for shot in film.shots for tag in shot.tags)
    named = {tag: [shot for shot in film.shots if tag in shot.tags] for tag in tags}
    pictures = [thumb(shot.image) if shot.image else "" for shot in read_rows(out / f"{stem}.parquet")]
    lasts, reasons = [s.end_s - s.start_s for s in film.shots], [s.reason for s in film.shots if not s.kept]
    about = {"title": film.film, "film": done, "shots": film.shots, "cast": film.cast, "named": named}
    path = out / "report" / "films" / f"{stem}.html"
    write_page(path, "film.html", pictures=pictures, **about, **_charts(lasts, reasons))
    return {"page": "films/" + quote(os.fsencode(f"{stem}.html")), "lasts": lasts, "reasons": reasons}


def _charts(lasts: Sequence[float], reasons: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """How many shots last how long, and how many are set aside why, where figures in a reason do not count."""
    bars, lengths = [*(f"up to {bound:g} s" for bound in BOUNDS), "longer"], Counter(bisect(BOUNDS, s) for s in lasts)
    kinds = Counter(re.split(r" \(|: ", reason)[0] for reason in reasons)
    return {"lengths": [(bar, lengths[i]) for i, bar in enumerate(bars)], "rejections": kinds.most_common()}


def thumb(image: bytes) -> str:
    """A small copy of a JPEG as a data: address."""
    picture, buffer = Image.open(io.BytesIO(image)), io.BytesIO()
    picture.draft("RGB", (THUMB, THUMB // 2))
    picture.thumbnail((THUMB, THUMB))
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table: nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", " ".join(str(value).split()))


def write_page(path: Path, template: str, **content: Any) -> None:
    """Write a page from a template; all content is escaped."""
    pages = jinja2.Environment(autoescape=jinja2.select_autoescape(), undefined=jinja2.StrictUndefined)
    pages.loader = jinja2.FileSystemLoader(Path(__file__).parent / "pages")
    pages.trim_blocks = pages.keep_trailing_newline = True
    pages.filters |= {"cell": _cell, "from_json": json.loads, "split_at_tags": re.compile(f"({TAG.pattern})").split}
    write_text(path, pages.get_template(template).render(**content))
