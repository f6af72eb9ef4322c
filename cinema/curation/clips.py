"""The shots of a film as videos: one tar per film, and a table that says where in it each shot lies.

Shots are encoded anew, since a copied stream can only begin at a key frame: a shot would begin with frames of its
neighbour. They keep the size of the film, black borders included; the film's table has its picture area.
"""

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import av
import pyarrow as pa
import pyarrow.parquet as pq

from cinema.curation.film import Film, FrameReader
from cinema.curation.store import CuratedShot, schema_of, writing
from cinema.files import atomic

FOLDER = "clips"
# Looks like the film; without x264's look-ahead, which is slow and did not always give the same bytes.
ENCODER = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}


@dataclass(frozen=True)
class Clip:
    """Where the video of a shot lies: bytes `offset` to `offset + size` of the tar are an MP4 file."""

    shot: int
    tar: str
    offset: int
    size: int


def write_clips(film: Film, shots: list[CuratedShot], out: Path, tell: Callable[[float], None]) -> None:
    """Write the kept shots as `out`/clips/<film stem>.tar, and `.parquet` beside it with a row per `Clip`.

    The same film gives the same bytes. `tell` is told the share done. Raises StoppedError if nothing can be written.
    """
    path, clips = out / FOLDER / f"{film.path.stem}.tar", list[Clip]()
    with writing(path), atomic(path) as part, tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for shot, video in _videos(film, shots, tell):
            entry = tarfile.TarInfo(f"{shot:05}.mp4")  # owner, mode and time are the same for all
            entry.size = video.seek(0, io.SEEK_END)
            clips.append(Clip(shot, path.name, tar.offset + tarfile.BLOCKSIZE, entry.size))  # its header is one block
            video.seek(0)
            tar.addfile(entry, video)
    table = pa.Table.from_pylist([vars(clip) for clip in clips], schema=schema_of(Clip))
    with writing(path), atomic(path.with_suffix(".parquet")) as part, open(part, "wb") as file:
        pq.write_table(table, file)


def _videos(film: Film, shots: list[CuratedShot], tell: Callable[[float], None]) -> Iterator[tuple[int, IO[bytes]]]:
    """(number, MP4 file) of every kept shot, in a file without a name; the film is decoded once."""
    wanted, frames = [shot for shot in shots if shot.kept], iter(FrameReader(film))
    for number, shot in enumerate(wanted):
        tell(number / len(wanted))
        with tempfile.TemporaryFile() as file, av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=film.rate, options=ENCODER)
            stream.width, stream.height, stream.pix_fmt = film.width // 2 * 2, film.height // 2 * 2, "yuv420p"
            codec = stream.codec_context
            codec.thread_count, codec.time_base, codec.sample_aspect_ratio = 1, film.time_base, film.sample_aspect
            start: int | None = None
            for frame in frames:
                if frame.index >= shot.start_frame and not frame.damaged:
                    start = frame.pts if start is None else start
                    image = frame.image.reformat(stream.width, stream.height, "yuv420p")
                    image.pts, image.time_base, image.pict_type = frame.pts - start, film.time_base, 0
                    container.mux(stream.encode(image))
                if frame.index >= shot.end_frame - 1:
                    break
            container.mux(stream.encode(None))
            container.close()
            yield shot.shot, file
