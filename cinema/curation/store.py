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
from cinema.files import atomic, write_json
from cinema.story import Character, Shot, Source, Story

STORE_VERSION = 3
ROW_GROUP = 32  # rows read together when a shot is fetched by number
UNREADABLE = (pa.ArrowException, KeyError, TypeError, ValueError, OSError)
LONGEST = 600.0  # seconds that a Story's shot may last


class StoppedError(UserError):
    """The whole run cannot go on, not only one film."""


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


ARROW: dict[Any, Any] = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
ARROW |= {
    list[str]: pa.list_(pa.string()),
    float | None: pa.float64(),
    int | None: pa.int64(),
    bytes | None: pa.binary(),
}


def schema_of(kind: Any) -> pa.Schema:
    """The table that holds a dataclass per row."""
    return pa.schema([(f.name, ARROW[f.type]) for f in fields(kind)])


@dataclass(frozen=True)
class CuratedFilm:
    """A Parquet file of curation in memory: the film's file name, its cast, its shots in order."""

    film: str
    cast: list[Character]
    shots: list[CuratedShot]


def write_film(path: Path, film: str, cast: Sequence[Character], shots: Iterable[CuratedShot]) -> None:
    """Write the shots of a film of that name; the same shots give the same bytes.

    Raises StoppedError where nothing can be written.
    """
    write_rows(path, shots, lambda: {"film": film, "cast": [c.model_dump() for c in cast]})


def read_film(path: Path, images: bool = True) -> CuratedFilm:
    """Read a Parquet file of curation, without its `images` if so said; UserError if it is missing or none."""
    try:
        rows, about = read_rows(path, images)
        return CuratedFilm(about["film"], [Character(**c) for c in about["cast"]], rows)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; curate the film first") from None
    except UNREADABLE:
        raise UserError(f"{path}: not a curated film, or damaged; curate the film again") from None


def write_rows(path: Path, rows: Iterable[CuratedShot], about: Callable[[], dict[str, Any]]) -> None:
    """As `write_film`, row by row; `about`, asked after the last one, gives anything of JSON to go with them."""
    schema, rows = schema_of(CuratedShot), iter(rows)
    # Nothing is compressed: a JPEG is already, and the rest is small.
    with (
        writing(path),
        atomic(path) as part,
        open(part, "wb") as file,  # a name that is no UTF-8 is none to Arrow
        pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as table,
    ):
        while group := list(islice(rows, ROW_GROUP)):
            table.write_table(pa.Table.from_pylist([vars(row) for row in group], schema=schema))
        table.add_key_value_metadata(
            {"cinema": json.dumps({"store_version": STORE_VERSION} | about(), ensure_ascii=False)}
        )


def read_rows(path: Path, images: bool = True) -> tuple[list[CuratedShot], dict[str, Any]]:
    """What `write_rows` wrote, with `images` or None instead; raises one of UNREADABLE if that cannot be read."""
    names = [name for name in schema_of(CuratedShot).names if images or name != "image"]
    with open(path, "rb") as file, pq.ParquetFile(file) as table:
        rows = table.read(columns=names).select(names).to_pylist()
        return [CuratedShot(**{"image": None} | row) for row in rows], json.loads(table.metadata.metadata[b"cinema"])


def read_images(path: Path) -> Iterator[bytes | None]:
    """The images of all rows of a Parquet file of curation, in order; few are in memory at once."""
    with open(path, "rb") as file, pq.ParquetFile(file) as table:
        for group in range(table.num_row_groups):
            yield from table.read_row_group(group, columns=["image"])["image"].to_pylist()


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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_done(path: Path, data: dict[str, Any]) -> None:
    """Write a done-file. Raises StoppedError where nothing can be written."""
    with writing(path):
        write_json(path, data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing `path` into StoppedError, for the length of a block."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise StoppedError(f"{path.parent}: cannot write there ({why}); make room or choose another folder") from None
