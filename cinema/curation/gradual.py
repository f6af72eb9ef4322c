"""Fades and dissolves: pictures that turn into others step by step, in place.

In a dissolve from A to B a frame is (1 - alpha) A + alpha B, alpha rising from 0 to 1. So a pixel goes straight from
its old value to its new one, in many small steps; where things move, it jumps when an edge passes it. Before and
after, most of these pixels hold still; under a slow camera they go on changing. What moves within the two shots
spoils only its own pixels. A fade is a dissolve from black, or from any flat picture.

Array axes: `t` steps of the window; `c h w` as in `cinema.curation.planes`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int16

from cinema.curation.planes import FLOOR, Planes, change, is_another_picture, is_flat

STEPS_PER_SECOND = 12  # at which a transition is looked at; at least the film's rate where that is lower
LENGTHS = (5, 7, 10, 14, 20, 28)  # steps of the windows in which one is looked for
STRAIGHT = 0.3  # halfway, a pixel may be so far from the mean of its ends, as a share of its whole change
JUMP = 0.5  # no step of a pixel may be a larger share of its change
BACK = 0.15  # and none a larger share backwards
SHARE = 0.4  # of all change, so much must be of pixels like that
HOLD = 0.09  # half of them change by no larger a share within half a window before, and after


@dataclass(frozen=True)
class Blend:
    """A "dissolve" or a "fade", and where the new shot begins: where it outweighs the old one, or black ends.

    `time` is in seconds, `until` the frame in which it is over.
    """

    index: int
    time: float
    kind: str
    until: int


class Gradual:
    """Looks for fades and dissolves in the latest pictures of a shot."""

    def __init__(self, rate: float):
        self._every = max(1, round(rate / STEPS_PER_SECOND))
        self._steps: list[tuple[int, float, Planes]] = []  # frame, second, picture
        self._seen = 0

    def add(self, index: int, time: float, planes: Planes) -> Blend | None:
        """Take in the next picture; what it completes."""
        self._seen += 1
        if self._seen % self._every:
            return None
        self._steps = [*self._steps[1 - 2 * (LENGTHS[-1] + 1) :], (index, time, planes[:, ::2, ::2])]
        windows = (self._blend(length) for length in LENGTHS if len(self._steps) > length + length // 2)
        return next((blend for blend in windows if blend), None)

    def forget(self, before: int) -> None:
        """A shot begins: what was seen before that frame is of another one."""
        self._steps = [step for step in self._steps if step[0] >= before]

    def _blend(self, length: int) -> Blend | None:
        """What lies in the window that ended half its length ago."""
        last = len(self._steps) - 1 - length // 2
        first = last - length
        window = [planes for _, _, planes in self._steps[first : last + 1]]
        old, new = window[0], window[-1]
        if change(old, new) < FLOOR or not _is_straight(old, window[length // 2], new, (length // 2) / length):
            return None
        if is_flat(new) or not is_another_picture(old, new):  # it fades out: the shot lasts until black ends
            return None
        frames = np.stack(window).astype(np.int16)
        whole, good = frames[-1] - frames[0], _gradual_pixels(frames)
        weight = np.abs(whole) * good
        fades, (before, after) = is_flat(old), (self._steps[max(0, first - length // 2)][2], self._steps[-1][2])
        moves = max(0.0 if fades else _movement(frames[0], before, weight), _movement(frames[-1], after, weight))
        if weight.sum() < SHARE * np.abs(whole).sum() or moves > HOLD:
            return None
        kind = "fade" if fades else "dissolve"
        alpha = ((frames - frames[0]) * (np.sign(whole) * good)).sum(axis=(1, 2, 3)) / weight.sum()
        at = int(np.argmax(alpha > (0.08 if fades else 0.5)))
        return Blend(*self._steps[first + at][:2], kind, self._steps[last][0])


def _is_straight(old: Planes, middle: Planes, new: Planes, alpha: float) -> bool:
    """Whether enough of the picture is between its ends where it should be: cheap, and mostly it is not."""
    whole = new.astype(np.int16) - old
    off = np.abs(middle.astype(np.int16) - old - alpha * whole)
    size = np.abs(whole)
    return bool((size * (off <= STRAIGHT * size)).sum() >= SHARE * size.sum())


def _gradual_pixels(frames: Int16[np.ndarray, "t c h w"]) -> Bool[np.ndarray, "c h w"]:
    """Pixels that go from the first frame to the last in small steps one way."""
    whole, steps = frames[-1] - frames[0], np.diff(frames, axis=0)
    size = np.abs(whole)
    small = np.abs(steps).max(axis=0) <= JUMP * size
    return small & ((steps * np.sign(whole)).min(axis=0) >= -BACK * size) & (size > 0)


def _movement(end: Int16[np.ndarray, "c h w"], beyond: Planes, weight: Int16[np.ndarray, "c h w"]) -> float:
    """The median change from an end of the window to beyond it, as a share of `weight`, where that is large."""
    large = weight >= FLOOR
    return float(np.median(np.abs(end - beyond)[large] / weight[large])) if large.any() else 0.0
