"""The keyframes of a film: borders off, the middle of every shot upright, cropped 2:1 and resized, useless ones named.

Which keyframes are not worth training on: blank, black, blurred, a text card, or the last one again. Every filter is
a number and a threshold, both stored with the shot, so that another choice needs no second look at the film.
Array axes: `h w` rows and columns of a frame, from the top left; channels are RGB or grey, 0-255.
"""

import io
import json
import math
from collections.abc import Callable, Iterator

import av
import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from cinema.curation.film import Box, Film, Glimpses, Timeline, planes_of, read_frames
from cinema.curation.shots import cut_film
from cinema.curation.store import CuratedShot

BLACK = 30.0  # raw luma up to which a row or column is border; 16 is black in most files
FLAT = 24  # raw luma up to which a shot's own bars are flat black
BRIGHT = 60.0  # mean luma from which a frame says where its border is; dark scenes, fades and cards mislead
SHINE = 0.25  # a line at most so bright, as a share of the brightest next to it, is lit by it: compression smears edges
MOST, EVERY = 100, 6.0  # key frames looked at, about, and seconds between two of them, at least
ENOUGH = 12  # looks that make bars certain: with fewer key frames, what follows them is looked at too
SPACING = 0.5  # seconds between two looks

SMALL = (128, 64)  # pixels at which blur and repetition are judged: a small film that was enlarged is not blurred
BLANK = 8.0  # grey levels within which 90 % of a blank frame lie
DARK = 24.0  # grey level above which 5 % of a frame lie at least, unless it is black
BLURRED = 0.02  # detail of a frame that is still sharp at SMALL, as a share of its contrast
CARD = 0.7  # share of a text card that is plain background behind thin, far brighter or darker strokes
SAME = 2.0  # mean grey levels by which a frame differs from the last one kept at least

Scores = dict[str, tuple[float, float]]  # filter -> (score, threshold)
Look = tuple[float, Bool[np.ndarray, "rows"], Bool[np.ndarray, "columns"]]  # a frame's mean luma, and what is lit


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


def _looks(film: Film, glimpses: Glimpses | None) -> list[Look]:
    looks, last = list[Look](), -math.inf
    for frame in read_frames(film, glimpses=glimpses):
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


def scan_film(
    film: Film, height: int, detector: str, line: Timeline, on_progress: Callable[[float, str], None]
) -> Iterator[CuratedShot]:
    """Give a film's shots, which tile it, each with a keyframe of `height` x `2 * height` pixels, without captions.

    `detector` is one of `shots.DETECTORS`; `line` is filled on the way; `on_progress` is told the share done, 0 to 1,
    and what is happening. Raises UserError where not one frame can be decoded.
    """
    on_progress(0.0, "looking for borders")
    borders, expected, base, filters = find_borders(film), film.expected_frames, film.time_base, Filters()
    shots = cut_film(film, borders, detector, line, lambda i: on_progress(min(1.0, i / expected), "finding cuts"))
    for number, shot in enumerate(shots):
        picture, image, reason, middle = borders, None, "no frame of it is free of decoding errors", shot.middle
        scores: Scores = {"damaged": (shot.damaged / (shot.end - shot.start), 1.0)}
        if middle:
            picture = shot_picture(middle.image, film, borders)
            pixels = keyframe_image(middle.image, film, picture, height)
            found, reason = filters.judge(pixels)
            image, scores = to_jpeg(pixels), scores | found
        yield CuratedShot(
            shot=number, start_frame=shot.start, end_frame=shot.end, time_base=str(base), transition=shot.transition,
            start_s=float(shot.start_pts * base), end_s=float(shot.end_pts * base), image=image,
            keyframe_frame=middle.index if middle else None, keyframe_s=float(middle.pts * base) if middle else None,
            kept=not reason, reason=reason, scores=json.dumps(scores),
            **{f"crop_{side}": at for side, at in picture._asdict().items()},
        )  # fmt: skip


class Filters:
    """Judges the keyframes of one film, in order: it remembers the last one kept."""

    def __init__(self) -> None:
        self._last: Float[np.ndarray, "h w"] | None = None

    def judge(self, pixels: UInt8[np.ndarray, "h w 3"]) -> tuple[Scores, str]:
        """Score a keyframe, and say why to set it aside, "" for not at all; a set that returns later is welcome."""
        grey = Image.fromarray(pixels).convert("L")
        whole, small = np.asarray(grey), np.asarray(grey.resize(SMALL, Image.Resampling.BOX), np.float32)
        low, high = np.percentile(whole[::2, ::2], [5, 95])
        differs = 255.0 if self._last is None else float(np.abs(small - self._last).mean())
        tests = (  # the first that fails is the reason: a card is nearly blank
            ("card", card := text_card(whole), CARD, card > CARD, "text card"),
            ("contrast", float(high - low), BLANK, high - low < BLANK, "blank frame"),
            ("brightness", float(high), DARK, high < DARK, "black frame"),
            ("sharpness", sharp := sharpness(small), BLURRED, sharp < BLURRED, "blurred frame"),
            ("difference", differs, SAME, differs < SAME, "the keyframe before it again"),
        )
        reason = next((reason for *_, failed, reason in tests if failed), "")
        self._last = self._last if reason else small
        return {name: (round(score, 4), least) for name, score, least, *_ in tests}, reason


def sharpness(grey: Float[np.ndarray, "h w"]) -> float:
    """Standard deviation of what a 3 x 3 mean takes away, as a share of the picture's; 1 for noise, 0 for fog."""
    return float((grey - cv2.blur(grey, (3, 3)))[1:-1, 1:-1].std() / (grey.std() + 1e-6))


def text_card(grey: UInt8[np.ndarray, "h w"]) -> float:
    """Share of the picture within 12 grey levels of its median, where what is more than 60 away is thin; else 0.

    Thin: at least half of that lies within a hundredth of the height of what is not.
    """
    off = np.abs(grey.astype(np.int16) - int(np.median(grey)))
    ink, reach = off > 60, max(1, len(grey) // 100)
    core = ink[2 * reach :, reach:-reach] & ink[: -2 * reach, reach:-reach]
    core &= ink[reach:-reach, 2 * reach :] & ink[reach:-reach, : -2 * reach]
    return 0.0 if not 0.002 < ink.mean() < 0.3 or core.sum() > 0.5 * ink.sum() else float((off <= 12).mean())
