"""What curation leaves on disk: one Parquet file per film, a row per shot, and beside it a done-file.

A Parquet file without its done-file is not finished. Both appear whole or not at all, the done-file last.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cinema.errors import UserError
from cinema.files import atomic
from cinema.story import Character, Shot, Source, Story

STORE_VERSION = 4
ROW_GROUP = 32  # rows read together when a shot is fetched by number
LONGEST = 600.0  # seconds that a Story's shot may last


class StoppedError(UserError):
    """The whole run cannot go on, not only one film; of `curate`, its `report` says what was done before."""

    report: Any = None  # a CurationReport


@dataclass(frozen=True)
class CuratedShot:
    """A row: one shot of a film. The field names are the columns; times are PTS, exactly `pts * time_base` seconds."""

    shot: int  # its number in the film, from 0; shots tile the film
    start_s: float
    end_s: float  # exclusive, as are all ends
    start_frame: int  # in presentation order from 0
    end_frame: int
    time_base: str  # seconds per tick, as a fraction such as "1/12800"
    keyframe_s: float | None  # None, and no image, if no frame of the shot could be trusted
    crop_left: int  # picture area in pixels of the stored frame
    crop_top: int
    crop_right: int
    crop_bottom: int
    image: bytes | None  # the keyframe as JPEG
    caption: str = ""
    tags: list[str] = field(default_factory=list)  # the characters named in the caption
    kept: bool = True  # whether to train on it
    reason: str = ""  # why not
    transition: str = "cut"  # how the shot begins: "cut", "dissolve" or "fade"
    keyframe_frame: int | None = None
    scores: str = "{}"  # JSON object of what the filters measured, name -> [score, threshold]


ARROW: dict[Any, Any] = {int: "int64", float: "double", str: "string", bool: "bool", bytes | None: "binary"}
ARROW |= {int | None: "int64", float | None: "double", list[str]: pa.list_(pa.string())}
SCHEMA = pa.schema([(f.name, ARROW[f.type]) for f in fields(CuratedShot)])


@dataclass(frozen=True)
class CuratedFilm:
    """A Parquet file of curation in memory: the film's file name, its cast, its shots in order."""

    film: str
    cast: list[Character]
    shots: list[CuratedShot]
    about: dict[str, Any] = field(default_factory=dict)  # of one that is not done yet: what was asked, and seen


def write_film(
    path: Path,
    film: str,
    cast: Sequence[Character],
    shots: Iterable[CuratedShot],
    about: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Write the shots of a film of that name; the same shots give the same bytes. `about` is asked after the last one.

    Raises StoppedError where nothing can be written.
    """
    rows = iter(shots)
    with (
        writing(path),
        atomic(path) as part,
        open(part, "wb") as file,  # a name that is no UTF-8 is none to Arrow
        # Nothing is compressed: a JPEG is already, and the rest is small.
        pq.ParquetWriter(file, SCHEMA, compression="none", use_dictionary=False) as table,
    ):
        while group := list(islice(rows, ROW_GROUP)):
            table.write_table(pa.Table.from_pylist([vars(row) for row in group], schema=SCHEMA))
        facts = {"store_version": STORE_VERSION, "film": film, "cast": [c.model_dump() for c in cast], "about": about()}
        table.add_key_value_metadata({"cinema": json.dumps(facts, ensure_ascii=False)})


def read_film(path: Path, images: bool = True) -> CuratedFilm:
    """Read a Parquet file of curation, without its `images` if so said; UserError if it is missing or none."""
    try:
        rows = list(read_rows(path, images))
        with open(path, "rb") as file:
            facts = json.loads(pq.read_metadata(file).metadata[b"cinema"])
        return CuratedFilm(facts["film"], [Character(**c) for c in facts["cast"]], rows, facts.get("about", {}))
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError):
        what = "not a curated film, or damaged" if path.exists() else "there is no such file"
        raise UserError(f"{path}: {what}; curate the film again") from None


def read_rows(path: Path, images: bool = True) -> Iterator[CuratedShot]:
    """The rows of a Parquet file of curation, with `images` or None instead; few are in memory at once."""
    names = [name for name in SCHEMA.names if images or name != "image"]
    with open(path, "rb") as file, pq.ParquetFile(file) as table:
        for group in table.iter_batches(ROW_GROUP, columns=names):
            yield from (CuratedShot(**{"image": None} | row) for row in group.to_pylist())


def story_of(path: Path) -> Story:
    """The story that a curated film tells: its kept and captioned shots, in order; UserError if there are none.

    Tags that captions name without an entry in the cast get one, without description.
    """
    film = read_film(path, images=False)
    if not (told := [s for s in film.shots if s.kept and s.caption]):
        raise UserError(f"{path}: no shot is kept and has a caption; curate the film with an annotator")
    cast = {tag: Character(tag=tag) for s in told for tag in s.tags} | {c.tag: c for c in film.cast}
    shots = []
    for s in told:
        times = {"start_s": max(0.0, s.start_s), "end_s": max(1e-6, s.end_s)}  # some files begin before zero
        source = Source(film=film.film, start_frame=s.start_frame, end_frame=s.end_frame, **times)
        shots.append(Shot(caption=s.caption, duration=min(s.end_s - s.start_s, LONGEST), source=source))
    return Story(title=Path(film.film).stem[:200], cast=list(cast.values()), shots=shots)


def read_done(path: Path) -> dict[str, Any]:
    """A done-file's content; empty if there is none or it is not whole."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def read_all_done(out: Path) -> dict[str, dict[str, Any]]:
    """The done-files of a folder by the stems of their films."""
    done = {path.name.removesuffix(".done.json"): read_done(path) for path in sorted(out.glob("*.done.json"))}
    return {stem: film for stem, film in done.items() if film}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing `path` into StoppedError, for the length of a block."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise StoppedError(f"{path.parent}: cannot write there ({why}); make room or choose another folder") from None
