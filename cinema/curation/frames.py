"""From a decoded frame to a training keyframe: borders off, sample aspect and rotation on, crop 2:1, area resize.

Array axes: `h w` rows and columns of a stored frame, from the top left; channels are RGB, 0-255.
"""

import io
from dataclasses import dataclass

import av
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cinema.curation.film import Film, FrameReader, planes_of

BLACK = 30.0  # raw luma up to which a row or column is border; 16 is black in most files
BRIGHT = 60.0  # mean luma from which a frame says where its border is; dark scenes, fades and cards mislead
ENOUGH = 24  # key frames from which borders are read off key frames alone
MOST = 200  # frames looked at, at most


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the stored frame; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


def find_borders(film: Film) -> Box:
    """The picture area of a film: what is left without black bars, decided once for the whole film.

    Per row and column the 95th percentile of luma, over bright frames its 0.9 quantile; what stays at or below
    30 from an edge inwards is a bar. Opposite bars must agree within 2 % of the side, else the thinner holds for both.
    """
    if len(profiles := _profiles(film, keys_only=True)) < ENOUGH:  # a short film, or one with few key frames
        profiles = _profiles(film, keys_only=False)
    if not profiles:
        return Box(0, 0, film.width, film.height)
    means, rows, columns = (np.stack(part) for part in zip(*profiles, strict=True))
    bright = means > BRIGHT if (means > BRIGHT).any() else means >= np.quantile(means, 0.9)
    top, bottom = _bars(np.quantile(rows[bright], 0.9, axis=0))
    left, right = _bars(np.quantile(columns[bright], 0.9, axis=0))
    return Box(left, top, film.width - right, film.height - bottom)


def _profiles(film: Film, keys_only: bool) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Mean luma, and the 95th percentiles of every row and column, of evenly spread frames."""
    kept, stride = list[tuple[float, np.ndarray, np.ndarray]](), 1
    for frame in FrameReader(film, keys_only):
        odd_size = (frame.image.width, frame.image.height) != (film.width, film.height)
        if frame.index % stride or frame.damaged or odd_size:
            continue
        y = planes_of(frame.image, film)[0]
        kept.append((float(y.mean()), _p95(y[:, ::2].T), _p95(y[::2])))
        if len(kept) == MOST:
            kept, stride = kept[::2], stride * 2
    return kept


def _p95(values: UInt8[np.ndarray, "n lines"]) -> UInt8[np.ndarray, "lines"]:
    return np.sort(values, axis=0, kind="stable")[int(0.95 * (len(values) - 1))]  # stable: counts, the fastest of bytes


def _bars(profile: Float[np.ndarray, "lines"]) -> tuple[int, int]:
    """Widths of the bars at both ends of a profile of luma; none where they would leave less than a quarter."""
    lit = np.flatnonzero(profile > BLACK)
    if not len(lit) or 4 * (np.ptp(lit) + 1) < len(profile):
        return 0, 0
    first, last = int(lit[0]), int(len(profile) - 1 - lit[-1])
    return (first, last) if abs(first - last) <= 0.02 * len(profile) else (min(first, last),) * 2


def keyframe_image(image: av.VideoFrame, film: Film, picture: Box, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """The centre of a frame's picture area as it is meant to be seen: RGB, `height` x `2 * height`."""
    pixels = image.to_ndarray(width=film.width, height=film.height, format="rgb24")
    turns = round(image.rotation / 90) % 4  # quarter turns, counter-clockwise
    upright = np.rot90(pixels[picture.top : picture.bottom, picture.left : picture.right], turns)
    aspect = float(film.sample_aspect if turns % 2 == 0 else 1 / film.sample_aspect)
    h, w = upright.shape[:2]
    # The crop in stored pixels, fractional: one resize then does aspect, crop and size together.
    crop_w, crop_h = min(w, 2 * h / aspect), min(h, w * aspect / 2)
    left, top = (w - crop_w) / 2, (h - crop_h) / 2
    shrinks = crop_h >= height and crop_w >= 2 * height
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC  # BOX is the mean over the area
    box = (left, top, left + crop_w, top + crop_h)
    return np.asarray(Image.fromarray(np.ascontiguousarray(upright)).resize((2 * height, height), how, box))


def to_jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode as JPEG, quality 95, colour at full resolution."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
