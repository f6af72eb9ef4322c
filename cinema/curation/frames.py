"""From a decoded frame to a training keyframe: borders off, sample aspect and rotation on, crop 2:1, area resize.

Array axes: `h w` rows and columns of a stored frame, from the top left; channels are RGB, 0-255.
"""

import io
import math
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from cinema.curation.film import Film, FrameReader, planes_of

BLACK = 30.0  # raw luma up to which a row or column is border; 16 is black in most files
FLAT = 24  # raw luma up to which a shot's own bars are flat black
BRIGHT = 60.0  # mean luma from which a frame says where its border is; dark scenes, fades and cards mislead
SHINE = 0.25  # a line at most so bright, as a share of the brightest next to it, is lit by it: compression smears edges
MOST, EVERY = 100, 6.0  # key frames looked at, about, and seconds between two of them, at least
ENOUGH = 12  # looks that make bars certain: with fewer key frames, what follows them is looked at too
SPACING = 0.5  # seconds between two looks

Look = tuple[float, Bool[np.ndarray, "rows"], Bool[np.ndarray, "columns"]]  # a frame's mean luma, and what is lit


class Box(NamedTuple):
    """A rectangle in pixels of the stored frame; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


def find_borders(film: Film) -> Box:
    """The picture area of a film: what is left without black bars, decided once for the whole film.

    A row or column is lit in a frame if its level, the 95th percentile of its luma, is above BLACK and no mere shine
    of a line beside it. What is lit in at most a tenth of the bright frames, from an edge inwards, is a bar.
    """
    every = (film.duration_s or 0.0) / MOST
    looks = _looks(film, (max(EVERY, every), 0.0))
    free = any(mean > BRIGHT for mean, *_ in looks) and _picture(film, looks) == (0, 0, film.width, film.height)
    if len(looks) < ENOUGH and not free:
        looks = _looks(film, (every, SPACING * ENOUGH / len(looks)) if looks else None)
    return _picture(film, looks)


def _looks(film: Film, glimpses: tuple[float, float] | None) -> list[Look]:
    looks, last = list[Look](), -math.inf
    for frame in FrameReader(film, glimpses):
        image, second = frame.image, float(frame.pts * film.time_base)
        usual = (image.width, image.height) == (film.width, film.height) and not frame.damaged
        if usual and (image.key_frame or second >= last + SPACING):
            y, last = planes_of(image, film)[0], second
            looks.append((float(y[::4, ::4].mean()), _lit(y[:, ::4]), _lit(y[::4].T)))
    return looks


def _lit(lines: UInt8[np.ndarray, "n pixels"]) -> Bool[np.ndarray, "n"]:
    levels = np.sort(lines, axis=1, kind="stable")[:, int(0.95 * (lines.shape[1] - 1))].astype(int)  # stable: counts
    near = np.lib.stride_tricks.sliding_window_view(np.pad(levels, 2), 5).max(axis=1)
    return (levels > BLACK) & (levels - 16 > SHINE * (near - 16))


def _picture(film: Film, looks: list[Look]) -> Box:
    if not looks:
        return Box(0, 0, film.width, film.height)
    means, *lit = (np.array(each) for each in zip(*looks, strict=True))
    bright = means >= min(BRIGHT, np.quantile(means, 0.9))  # a dark film has its brightest tenth
    (top, bottom), (left, right) = (_bars(lines[bright].mean(axis=0) > 0.1) for lines in lit)
    return Box(left, top, film.width - right, film.height - bottom)


def _bars(lit: Bool[np.ndarray, "n"]) -> tuple[int, int]:
    """Widths of the bars at both ends of the lines: none if less than a quarter is left, the thinner if they differ."""
    where = np.flatnonzero(lit)
    if not len(where) or 4 * (np.ptp(where) + 1) < len(lit):
        return 0, 0
    first, last = int(where[0]), int(len(lit) - 1 - where[-1])
    return (first, last) if abs(first - last) <= 0.02 * len(lit) else (min(first, last),) * 2


def shot_picture(image: av.VideoFrame, film: Film, picture: Box) -> Box:
    """The picture area of one shot, by a frame of it: cards have bars of their own, flat black to a straight edge."""
    y = planes_of(image, film)[0][picture.top : picture.bottom, picture.left : picture.right]
    left, top, right, bottom = (_flat(lines) for lines in (y.T, y, y.T[::-1], y[::-1]))
    box = Box(picture.left + left, picture.top + top, picture.right - right, picture.bottom - bottom)
    return box if 4 * (box.right - box.left) * (box.bottom - box.top) >= y.size else picture


def _flat(lines: UInt8[np.ndarray, "n pixels"]) -> int:
    """How many lines from the first on are flat black; none unless the picture then begins on most of their length."""
    edge = int(np.argmax(lines.max(axis=1) > FLAT))  # 0 also if all are
    return edge if edge and (lines[min(edge + 2, len(lines) - 1)] > BLACK).mean() > 0.6 else 0


def keyframe_image(image: av.VideoFrame, film: Film, picture: Box, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """The centre of a frame's picture area as it is meant to be seen: RGB, `height` x `2 * height`."""
    pixels = image.to_ndarray(width=film.width, height=film.height, format="rgb24")
    turns = round(image.rotation / 90) % 4  # quarter turns, counter-clockwise
    upright = np.rot90(pixels[picture.top : picture.bottom, picture.left : picture.right], turns)
    aspect = float(film.sample_aspect if turns % 2 == 0 else 1 / film.sample_aspect)
    h, w = upright.shape[:2]
    # The crop in stored pixels, fractional: one resize then does aspect, crop and size together.
    crop_w, crop_h = min(w, 2 * h / aspect), min(h, w * aspect / 2)
    box = (w - crop_w) / 2, (h - crop_h) / 2, (w + crop_w) / 2, (h + crop_h) / 2
    shrinks = crop_h >= height and crop_w >= 2 * height
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC  # BOX is the mean over the area
    return np.asarray(Image.fromarray(np.ascontiguousarray(upright)).resize((2 * height, height), how, box))


def to_jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode as JPEG, quality 95, colour at full resolution."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
