"""Films as files: H.264 in MP4 that every browser plays, written frame by frame, and read back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

from cinema.errors import UserError
from cinema.files import atomic

EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT  # else a level too dark
BT709 = 1  # the number that H.264 has for these primaries, this transfer and this matrix
# With one thread, and without the tree of macroblocks, whose weights vary: the same pictures give the same bytes.
STEADY = {"x264-params": "mbtree=0"}


class FilmWriter:
    """Writes a film frame by frame; the file appears whole when the block ends well, and not at all otherwise.

    `crf` is x264's constant rate factor: 0 is lossless, 18 looks so, 23 is usual. UserError for an odd or empty size
    (4:2:0 halves the colour), a name that does not end in ``.mp4``, or not one frame.
    """

    def __init__(self, path: Path, width: int, height: int, fps: int, crf: int = 18) -> None:
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise UserError(f"{path}: a film of {width} x {height} pixels cannot be written; both must be even")
        if path.suffix != ".mp4":
            raise UserError(f"{path}: films are written as MP4; give a name that ends in .mp4")
        self.path, self.size, self.frames, self._block = path, (width, height), 0, self._writing(fps, crf)

    @contextmanager
    def _writing(self, fps: int, crf: int) -> Iterator[None]:
        with atomic(self.path) as part, av.open(str(part), "w", options={"movflags": "+faststart"}) as self._file:
            self._stream = self._file.add_stream("libx264", rate=fps, options={"crf": str(crf)} | STEADY)
            (self._stream.width, self._stream.height), self._stream.pix_fmt = self.size, "yuv420p"
            codec = self._stream.codec_context
            codec.thread_count, codec.color_range = 1, ColorRange.MPEG
            codec.color_primaries = codec.color_trc = codec.colorspace = BT709  # said, since players guess differently
            yield
            if not self.frames:
                raise UserError(f"{self.path}: a film needs at least one frame; nothing was written")
            self._file.mux(self._stream.encode(None))

    def __enter__(self) -> "FilmWriter":
        self._block.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)

    def add(self, image: Image.Image) -> None:
        """Append one RGB frame; ValueError if its size is not the film's."""
        if image.size != self.size:
            raise ValueError(f"a frame of {image.size} pixels in a film of {self.size}")
        frame = av.VideoFrame.from_image(image).reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, interpolation="AREA"
        )
        frame.pts, self.frames = self.frames, self.frames + 1
        self._file.mux(self._stream.encode(frame))


def read_frames(path: Path) -> list[Image.Image]:
    """All frames of a film, RGB, in the order they are shown; UserError if it is missing or cannot be decoded."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such film; correct the path")
    try:
        with av.open(str(path)) as container:
            return [frame.to_image(interpolation=EXACT) for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        reason = getattr(error, "strerror", None) or "it holds no moving picture"
        raise UserError(f"{path}: not readable as a film ({reason}); it is cut off or something else") from None
