"""Films as files: H.264 in MP4 that every browser plays, written frame by frame."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.video.reformatter import ColorRange
from PIL import Image

from cinema.files import atomic

BT709 = 1  # the number that H.264 has for these primaries, this transfer and this matrix
# With one thread, and without the tree of macroblocks, whose weights vary: the same pictures give the same bytes.
STEADY = {"x264-params": "mbtree=0"}

Append = Callable[[Image.Image], None]


@contextmanager
def film_writer(path: Path, width: int, height: int, fps: int, crf: int = 18) -> Iterator[Append]:
    """Give what appends an RGB frame to a film, both sides of it even, since 4:2:0 halves the colour.

    The file appears whole when the block ends well, and not at all otherwise. `crf` is x264's constant rate factor:
    0 is lossless, 18 looks so, 23 is usual.
    """
    with atomic(path) as part, av.open(str(part), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf)} | STEADY)
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
