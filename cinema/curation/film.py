"""Reading a film file: facts about it, and its frames in presentation order.

Frames are decoded from the start and never by seeking, which picks wrong frames in several containers. Seconds are
PTS x time base: frame numbers lie where the rate varies. Axes: `h w` rows and columns of a plane as stored, 8 bit.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from jaxtyping import UInt8

from cinema.errors import UserError

# Decoders that go on writing into pictures they have handed out, when what follows is broken: these are copied.
OVERWRITES = frozenset(["mpeg1video", "mpeg2video"])
GAP_S = 1.0  # between the end of a frame and the next one: more is a loss

Glimpses = tuple[float, float]  # seconds between two key frames looked at, at least, and how long from each
Packets = Iterator[av.Packet | None]


@dataclass(frozen=True)
class Film:
    """What a film's header says: pixels of a stored frame, width of a pixel over its height, seconds per PTS tick,
    frames per second (a guess where they vary), its length in seconds if stated, and FFmpeg's name of its format."""

    path: Path
    width: int
    height: int
    sample_aspect: Fraction
    time_base: Fraction
    rate: Fraction
    duration_s: float | None
    container: str = ""

    @property
    def expected_frames(self) -> int:
        """Frames to expect, for progress only; at least 1."""
        return max(1, round((self.duration_s or 1.0) * self.rate))


class Box(NamedTuple):
    """A rectangle in pixels of the stored frame; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Frame:
    """A decoded frame: its index from 0, when it is shown and until when, whether its pixels can not be trusted."""

    index: int
    pts: int
    end_pts: int
    damaged: bool
    image: av.VideoFrame


def probe(path: Path) -> Film:
    """Read a film's header; UserError if it is missing, no film or without a moving picture."""
    with _opened(path) as (container, stream):
        base = stream.time_base or Fraction(1, av.time_base)
        duration = container.duration / av.time_base if container.duration else None
        if stream.duration is not None:  # better: the container's counts a longer sound track too
            duration = float(stream.duration * base)
        aspect, rate = stream.sample_aspect_ratio or Fraction(1), stream.average_rate or stream.guessed_rate
        size = stream.codec_context.width, stream.codec_context.height
        name = container.format.name.split(",")[0]
        return Film(path, *size, aspect, base, rate or Fraction(24), duration, name)


def planes_of(image: av.VideoFrame, film: Film) -> list[UInt8[np.ndarray, "h w"]]:
    """The Y, U and V planes of a frame, colour at half the size; views into it where it is stored so."""
    name = image.format.name  # of the two stored so, one has the full range of 8 bit
    image = image.reformat(film.width, film.height, name if name == "yuvj420p" else "yuv420p")
    return [
        np.frombuffer(memoryview(p), np.uint8).reshape(-1, p.line_size)[: p.height, : p.width] for p in image.planes
    ]


@dataclass
class Timeline:
    """What has been seen of a film so far: frames, when the last one ends, packets that could not be decoded, jumps
    of the clock, and ticks for which there is no frame."""

    pts: list[int] = field(default_factory=list)
    damaged: list[bool] = field(default_factory=list)
    end_pts: int = 0
    errors: int = 0
    jumps: int = 0
    missing: int = 0


def read_frames(film: Film, line: Timeline | None = None, glimpses: Glimpses | None = None) -> Iterator[Frame]:
    """One pass over the frames of a film, surviving what is broken in it; `line` is filled on the way.

    Every frame comes once; PTS strictly increase, also where the file's are missing or repeat. What follows a packet
    that is corrupt or cannot be decoded is `damaged` up to the next key frame, being predicted from it. With
    `glimpses`, no more than these are decoded and counted.
    """
    line, moved = line or Timeline(), 0  # `moved`: ticks to add where a clock has started anew
    step = max(1, round(1 / (film.rate * film.time_base)))
    with _opened(film.path) as (container, stream):
        every = _packets(container, stream, line)
        packets: Packets = _glimpsed(every, film, *glimpses) if glimpses else every
        for index, (image, damaged) in enumerate(_images(chain(packets, [None]), stream.codec_context, line)):
            pts = line.end_pts if image.pts is None else image.pts + moved
            if index:
                if pts < line.pts[-1] - 4 * step:
                    moved, pts, line.jumps = moved + line.end_pts - pts, line.end_pts, line.jumps + 1
                pts = max(pts, line.pts[-1] + 1)
                line.missing += gap if (gap := pts - line.end_pts) * film.time_base > GAP_S else 0
            line.pts.append(pts)
            line.damaged.append(damaged)
            line.end_pts = pts + (image.duration or step)
            yield Frame(index, pts, line.end_pts, damaged, image)


def _images(packets: Packets, codec: av.VideoCodecContext, line: Timeline) -> Iterator[tuple[av.VideoFrame, bool]]:
    """Pictures, and whether they are damaged: in decoding order, since one may be predicted from a later one."""
    bad_since, dts = math.inf, -math.inf
    for packet in packets:
        try:
            images, bad = codec.decode(packet), packet is not None and packet.is_corrupt
        except av.FFmpegError:
            images, bad = [], packet is not None
            line.errors += bad
        for image in images:
            when = image.dts if image.dts is not None else image.pts or 0
            if image.key_frame and not image.is_corrupt and when > bad_since:
                bad_since = math.inf
            if codec.name in OVERWRITES:
                image.make_writable()
            yield image, image.is_corrupt or when >= bad_since
        if packet is None:
            codec.flush_buffers()
        else:
            dts = dts if packet.dts is None else packet.dts
            bad_since = min(bad_since, dts) if bad else bad_since


def _packets(container: InputContainer, stream: VideoStream, line: Timeline) -> Iterator[av.Packet]:
    failures = 0  # in a row: a broken place is passed, a broken rest is given up
    while failures < 100:
        try:
            for packet in container.demux(stream):
                failures = 0
                if packet.size:  # the empty one that flushes is ours to send
                    yield packet
            return
        except (av.FFmpegError, IndexError):  # IndexError: a damaged stream "opens" another one midway
            line.errors, failures = line.errors + 1, failures + 1


def _glimpsed(packets: Iterator[av.Packet], film: Film, every: float, span: float) -> Packets:
    """The packets worth decoding; None where a stretch of them ends."""
    began = -math.inf
    for number, packet in enumerate(packets):
        at = float(number / film.rate if packet.dts is None else packet.dts * film.time_base)
        if packet.is_keyframe and at >= began + every:
            yield None
            began = at
        if at <= began + span:
            yield packet


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such film; correct the path")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (OSError, av.FFmpegError) as error:
        why = error.strerror or "unknown format"
        raise UserError(f"{path}: not readable as a film ({why}); it is cut off, damaged or something else") from None
    with container:
        # Cover art is a video stream too, of one picture.
        moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        codec = moving[0].codec_context if moving else None
        if codec is None or not codec.width:
            raise UserError(f"{path}: it holds no moving picture that can be decoded; give a film, or convert it")
        codec.thread_count = 1  # cheapest per film, and the same result every time
        codec.options = {"err_detect": "explode"}  # else broken pictures pass as whole, concealed
        yield container, moving[0]
