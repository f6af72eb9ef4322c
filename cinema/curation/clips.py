"""The shots of a film as videos: one tar per film, whose members are named by the shots' numbers.

Shots are encoded anew, since a copied stream can only begin at a key frame: a shot would begin with frames of its
neighbour. They keep the size of the film, black borders included; the film's table has its picture area.
"""

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import av

from cinema.curation.film import Film, Frame, read_frames
from cinema.curation.store import CuratedShot, writing
from cinema.files import atomic

# Looks like the film; without x264's look-ahead, which is slow and did not always give the same bytes.
ENCODER = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}


def write_clips(film: Film, shots: list[CuratedShot], path: Path, tell: Callable[[float], None]) -> None:
    """Write the kept shots as MP4 files into the tar `path`; the same film gives the same bytes.

    `tell` is told the share done. Raises StoppedError if nothing can be written.
    """
    frames, kept = read_frames(film), [shot for shot in shots if shot.kept]
    with writing(path), atomic(path) as part, tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, shot in enumerate(kept):
            tell(number / len(kept))
            entry = tarfile.TarInfo(f"{shot.shot:05}.mp4")  # owner, mode and time are the same for all
            with tempfile.TemporaryFile() as video:
                _encode(film, shot, frames, video)
                entry.size = video.seek(0, io.SEEK_END)
                video.seek(0)
                tar.addfile(entry, video)


def _encode(film: Film, shot: CuratedShot, frames: Iterator[Frame], file: IO[bytes]) -> None:
    """Write a shot as MP4; `frames` gives those of the film from somewhere before it."""
    with av.open(file, "w", format="mp4") as container:
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
