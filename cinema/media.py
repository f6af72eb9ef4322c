"""Films as files that every browser plays, written frame by frame: H.264 in MP4, VP9 in WebM; their captions beside."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
from av.video.reformatter import ColorRange
from PIL import Image

from cinema.files import atomic, write_text

BT709 = 1  # the number that H.264 has for these primaries, this transfer and this matrix
# With one thread, and without the tree of macroblocks, whose weights vary: the same pictures give the same bytes.
CODECS = {
    ".mp4": ("libx264", {"x264-params": "mbtree=0"}, {"movflags": "+faststart"}),
    ".webm": ("libvpx-vp9", {"b": "0"}, {"fflags": "+bitexact"}),  # without a bit rate, quality is constant
}  #: by a film's ending: what encodes it, and settings of that and of the container
Shots = Sequence[tuple[str, int]]  # a shot's caption, and how many frames it has

Append = Callable[[Image.Image], None]


@contextmanager
def film_writer(path: Path, width: int, height: int, fps: int, crf: int = 18, shots: Shots = ()) -> Iterator[Append]:
    """Give what appends an RGB frame to a film, both sides of it even, since 4:2:0 halves the colour.

    The file appears whole when the block ends well, and not at all otherwise; every one of its `shots` is a chapter.
    `crf` is the codec's constant rate factor: for x264 0 is lossless, 18 looks so, 23 is usual.
    """
    codec_name, settings, wrapping = CODECS[path.suffix]
    with atomic(path) as part, av.open(str(part), "w", options=wrapping) as container:
        ends = [*accumulate((count for _, count in shots), initial=0)]
        spans = enumerate(zip(ends[:-1], ends[1:], shots, strict=True))
        chapters: list[Any] = [
            {"id": i, "start": a, "end": b, "metadata": {"title": told}} for i, (a, b, (told, _)) in spans
        ]
        container.set_chapters([chapter | {"time_base": Fraction(1, fps)} for chapter in chapters])
        stream: Any = container.add_stream(codec_name, rate=fps, options={"crf": str(crf)} | settings)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.thread_count, codec.color_range = 1, ColorRange.MPEG
        codec.color_primaries = codec.color_trc = codec.colorspace = BT709  # said, since players guess differently

        def add(image: Image.Image) -> None:
            frame = av.VideoFrame.from_image(image)
            colours = {"format": "yuv420p", "dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
            container.mux(stream.encode(frame.reformat(**colours, interpolation="AREA")))

        yield add
        container.mux(stream.encode(None))


def write_captions(path: Path, shots: Shots, fps: int) -> None:
    """Write the captions of shots as a WebVTT track, each for as long as its shot is seen."""

    def stamp(frame: int) -> str:
        minutes, milliseconds = divmod(round(1000 * frame / fps), 60_000)
        return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}.{milliseconds % 1000:03}"

    ends = [*accumulate((count for _, count in shots), initial=0)]
    spans = zip(ends[:-1], ends[1:], shots, strict=True)
    cues = [f"{stamp(a)} --> {stamp(b)}\n{escape(' '.join(told.split()), quote=False)}\n" for a, b, (told, _) in spans]
    write_text(path, "\n".join(["WEBVTT\n", *cues]))
