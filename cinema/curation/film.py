"""Reading a film file: facts about it, and its frames in presentation order.

Frames are decoded from the start and never by seeking, which picks wrong frames in several containers. Seconds are
PTS x time base: frame numbers lie where the rate varies. Axes: `h w` rows and columns of a plane as stored, 8 bit.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from jaxtyping import UInt8

from cinema.errors import UserError

# Decoders that go on writing into pictures they have handed out, when what follows is broken: these are copied.
OVERWRITES = frozenset(["mpeg1video", "mpeg2video"])


@dataclass(frozen=True)
class Film:
    """What a film's header says: pixels of a stored frame, width of a pixel over its height, seconds per PTS tick,
    frames per second (a guess where they vary), and its length in seconds if stated."""

    path: Path
    width: int
    height: int
    sample_aspect: Fraction
    time_base: Fraction
    rate: Fraction
    duration_s: float | None

    @property
    def expected_frames(self) -> int:
        """Frames to expect, for progress only; at least 1."""
        return max(1, round((self.duration_s or 1.0) * self.rate))


@dataclass(frozen=True)
class Frame:
    """A decoded frame: its index from 0, when it is shown and until when, whether its pixels can not be trusted."""

    index: int
    pts: int
    end_pts: int
    damaged: bool
    image: av.VideoFrame


def probe(path: Path) -> Film:
    """Read a film's header; UserError if it is missing, a folder, empty, no film or without a moving picture."""
    with _opened(path) as (container, stream):
        base = stream.time_base or Fraction(1, av.time_base)
        duration = container.duration / av.time_base if container.duration else None
        if stream.duration is not None:  # better: the container's counts a longer sound track too
            duration = float(stream.duration * base)
        aspect, rate = stream.sample_aspect_ratio or Fraction(1), stream.average_rate or stream.guessed_rate
        size = stream.codec_context.width, stream.codec_context.height
        return Film(path, *size, aspect, base, rate or Fraction(24), duration)


def planes_of(image: av.VideoFrame, film: Film) -> list[UInt8[np.ndarray, "h w"]]:
    """The Y, U and V planes of a frame, colour at half the size; views into it where it is stored so."""
    as_is = image.format.name in ("yuv420p", "yuvj420p") and (image.width, image.height) == (film.width, film.height)
    image = image if as_is else image.reformat(width=film.width, height=film.height, format="yuv420p")
    sizes = [(p, np.frombuffer(memoryview(p), np.uint8)[: p.height * p.line_size]) for p in image.planes]
    return [rows.reshape(p.height, p.line_size)[:, : p.width] for p, rows in sizes]


class FrameReader:
    """One pass over the frames of a film, surviving what is broken in it.

    After a packet that cannot be decoded, or that the container marks as corrupt, every frame up to the next key
    frame is `damaged`, since it is predicted from what is missing. `errors` counts such packets so far, `jumps` how
    often the clock jumped back. What a codec decodes to a wrong picture without an error cannot be
    known.

    With `glimpses`, (every, span) in seconds, only key frames at least `every` apart are decoded, and what follows
    each within `span`; the index counts those frames.
    """

    def __init__(self, film: Film, glimpses: tuple[float, float] | None = None):
        self.film, self.errors, self.jumps, self._glimpses = film, 0, 0, glimpses
        self._bad_since: int | None = None

    def __iter__(self) -> Iterator[Frame]:
        """Yield every frame once; PTS strictly increase, also where the file's are missing or repeat."""
        step = max(1, round(1 / (self.film.rate * self.film.time_base)))
        last, end, moved = None, 0, 0  # `moved`: a clock that starts anew in the middle of the film goes on from there
        with _opened(self.film.path) as (container, stream):
            for index, image in enumerate(self._images(container, stream)):
                pts = image.pts + moved if image.pts is not None else end
                if last is not None and pts < last - 4 * step:
                    moved, pts, self.jumps = moved + end - pts, end, self.jumps + 1
                pts = pts if last is None or pts > last else last + 1
                last, end = pts, pts + (image.duration or step)
                if stream.codec_context.name in OVERWRITES:
                    image.make_writable()
                yield Frame(index, pts, end, self._is_damaged(image), image)

    def _images(self, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        codec, known = stream.codec_context, -(2**62)  # the last decoding time that a packet said
        for packet in self._packets(container, stream) if self._glimpses is None else self._glimpsed(container, stream):
            try:
                yield from codec.decode(packet)
                bad = packet is not None and packet.is_corrupt
            except av.FFmpegError:
                self.errors, bad = self.errors + 1, True
            if packet is None:
                codec.flush_buffers()
            elif bad and self._bad_since is None:
                self._bad_since = packet.dts if packet.dts is not None else known
            known = known if packet is None or packet.dts is None else packet.dts
        with contextlib.suppress(av.FFmpegError):
            yield from stream.codec_context.decode(None)

    def _glimpsed(self, container: InputContainer, stream: VideoStream) -> Iterator[av.Packet | None]:
        """The packets worth decoding; None where a stretch of them ends."""
        (every, span), began = self._glimpses or (0.0, 0.0), -math.inf
        for number, packet in enumerate(self._packets(container, stream)):
            at = float(number / self.film.rate if packet.dts is None else packet.dts * self.film.time_base)
            if packet.is_keyframe and at >= began + every:
                yield None
                began = at
            if at <= began + span:
                yield packet

    def _packets(self, container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
        failures = 0  # in a row: a broken place is passed, a broken rest is given up
        while failures < 100:
            try:
                for packet in container.demux(stream):
                    failures = 0
                    if packet.size:  # the empty one that flushes is ours to send
                        yield packet
                return
            except (av.FFmpegError, IndexError):  # IndexError: a damaged stream "opens" another one midway
                self.errors, failures = self.errors + 1, failures + 1

    def _is_damaged(self, image: av.VideoFrame) -> bool:
        # By decoding order (dts): a frame may be predicted from one that is shown after it.
        when = image.dts if image.dts is not None else image.pts or 0
        if self._bad_since is not None and image.key_frame and not image.is_corrupt and when > self._bad_since:
            self._bad_since = None
        return image.is_corrupt or (self._bad_since is not None and when >= self._bad_since)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    if not path.is_file():
        there = "is a folder; name the films in it" if path.is_dir() else "is no regular file; give a film"
        what = there if path.exists() else "there is no such film; correct the path"
        raise UserError(f"{path}: {what}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; copy it again")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (OSError, av.FFmpegError) as error:
        why = error.strerror or "unknown format"
        raise UserError(f"{path}: not readable as a film ({why}); it is cut off, damaged or something else") from None
    with container:
        # Cover art is a video stream too, of one picture.
        moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not moving or moving[0].codec_context is None or not moving[0].codec_context.width:
            raise UserError(f"{path}: it holds no moving picture that can be decoded; give a film, or convert it")
        moving[0].codec_context.thread_count = 1  # cheapest per film, and the same result every time
        moving[0].codec_context.options = {"err_detect": "explode"}  # else broken pictures pass as whole, concealed
        yield container, moving[0]
