"""One film, from its file to its shots and their keyframes: all of curation that looks at pixels.

Which keyframes are not worth training on: blank, black, blurred, a text card, or the last one again. Every filter is
a number and a threshold, both stored with the shot, so that another choice needs no second look at the film.
Array axes: `h w` rows and columns of a keyframe; RGB or grey, 0-255.
"""

import json
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cinema.curation.film import Film, Timeline
from cinema.curation.frames import find_borders, keyframe_image, shot_picture, to_jpeg
from cinema.curation.shots import cut_film
from cinema.curation.store import CuratedShot

SMALL = (128, 64)  # pixels at which blur and repetition are judged: a small film that was enlarged is not blurred
BLANK = 8.0  # grey levels within which 90 % of a blank frame lie
BLACK = 24.0  # grey level above which 5 % of a frame lie at least, unless it is black
BLURRED = 0.02  # detail of a frame that is still sharp at SMALL, as a share of its contrast
CARD = 0.7  # share of a text card that is plain background behind thin, far brighter or darker strokes
SAME = 2.0  # mean grey levels by which a frame differs from the last one kept at least

Scores = dict[str, tuple[float, float]]  # filter -> (score, threshold)


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
            ("brightness", float(high), BLACK, high < BLACK, "black frame"),
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
