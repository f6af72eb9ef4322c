"""Our detector, on a film's pictures as small Y, U and V planes: how far two are apart, what cuts, and what fades.

Array axes: `c` the planes Y, U, V, or U and V alone; `h w` rows and columns of the picture area, shrunk; `t` steps.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Int16, UInt8

from cinema.curation.film import Box, Film, Frame, planes_of

# Seconds, not frames: PySceneDetect's default of 15 frames drops cuts 14 frames apart, and at 8 fps whole shots.
SHORTEST_SHOT = 0.3
GRID = 160  # of a shrunk plane's longer side, about
FLOOR = 12.0  # another picture changes Y, U and V together by so much on average, of 255
GATE = 0.25  # and leaves another luma, by 1 - correlation, or else U and V that change by FLOOR: light changes do not
FLAT = 3.0  # standard deviation of luma up to which nothing is seen, as in black
SHORTEST_FRAMES = 8  # a shot lasts this many frames or SHORTEST_SHOT, whichever is shorter
RATIO = 3.0  # a cut changes the picture so much more than the frames around it do
WINDOW = 2  # changes on each side that a change is compared with
NEAR = 6  # frames beyond which they tell nothing, and after which a change is judged by those there are
STEPS_PER_SECOND = 12  # at which a transition is looked at; at least the film's rate where that is lower
LENGTHS = (5, 7, 10, 14, 20, 28)  # steps of the windows in which one is looked for
STRAIGHT = 0.3  # halfway, a pixel may be so far from the mean of its ends, as a share of its whole change
JUMP = 0.5  # no step of a pixel may be a larger share of its change
BACK = 0.15  # and none a larger share backwards
SHARE = 0.4  # of all change, so much must be of pixels like that
MARGIN = 0.1  # by a ninth of the pixels that share is known to within so much
HOLD = 0.09  # half of them change by no larger a share within half a window before, and after

Planes = UInt8[np.ndarray, "c h w"]
Boundaries = Iterator[tuple[int, str]]


def shrink_planes(frame: Frame, film: Film, picture: Box) -> Planes:
    """The picture area of Y, U and V, all of the size of a shrunk chroma plane, by the four pixels nearest to each."""
    left, top = picture.left // 2, picture.top // 2  # in chroma
    right, bottom = max(left + 1, picture.right // 2), max(top + 1, picture.bottom // 2)
    step = max(1.0, max(right - left, bottom - top) / GRID)
    size = round((right - left) / step) or 1, round((bottom - top) / step) or 1
    planes = zip(planes_of(frame.image, film), (2, 1, 1), strict=True)
    return np.stack([cv2.resize(p[k * top : k * bottom, k * left : k * right], size) for p, k in planes])


def change(a: Planes, b: Planes) -> float:
    """Mean absolute change of each plane, added up: black and white is not diluted by its dead colours."""
    return cv2.norm(a, b, cv2.NORM_L1) / a[0].size


def luma_distance(a: Planes, b: Planes) -> float:
    """1 - correlation of the lumas; 1 where one of them is flat, as black is."""
    y, z = (x[0].astype(np.float32) - x[0].mean(dtype=np.float32) for x in (a, b))
    norm = float(np.sqrt((y * y).mean() * (z * z).mean()))
    return 1 - float((y * z).mean()) / norm if norm > 1 else 1.0


def is_another_picture(a: Planes, b: Planes) -> bool:
    """Whether more than the light differs between two frames."""
    return change(a, b) >= FLOOR and (luma_distance(a, b) >= GATE or change(a[1:], b[1:]) >= FLOOR)


@dataclass(frozen=True)
class Turn:
    """A shot begins at frame `index`, `time` in seconds, by a "cut", or by a "dissolve" or "fade" over in `until`."""

    index: int
    time: float
    kind: str
    until: int


class Gradual:
    """Looks for fades and dissolves, pictures that turn into others step by step, in the latest of a shot.

    In a dissolve a pixel goes straight from its old value to its new one, in many small steps; where things move, it
    jumps when an edge passes it. Before and after, most of these pixels hold still; under a slow camera they go on
    changing. A fade is a dissolve from black, or from any flat picture.
    """

    def __init__(self, rate: float):
        self._every, self._seen = max(1, round(rate / STEPS_PER_SECOND)), 0
        self._steps: list[tuple[int, float, Planes]] = []  # frame, second, picture

    def add(self, index: int, time: float, planes: Planes) -> Turn | None:
        """Take in the next picture; what it completes: it begins where the new shot outweighs, or black ends."""
        self._seen += 1
        if self._seen % self._every:
            return None
        self._steps = [*self._steps[1 - 2 * (LENGTHS[-1] + 1) :], (index, time, planes[:, ::2, ::2].copy())]
        windows = (self._turn(length) for length in LENGTHS if len(self._steps) > length + length // 2)
        return next((turn for turn in windows if turn), None)

    def forget(self, before: int) -> None:
        """A shot begins: what was seen before that frame is of another one."""
        self._steps = [step for step in self._steps if step[0] >= before]

    def _turn(self, length: int) -> Turn | None:
        """What lies in the window that ended half its length ago."""
        last = len(self._steps) - 1 - length // 2
        first = last - length
        window = [planes for _, _, planes in self._steps[first : last + 1]]
        old, new = window[0], window[-1]
        if change(old, new) < FLOOR or not (_is_straight(window, 3, SHARE - MARGIN) and _is_straight(window, 1, SHARE)):
            return None
        fades, ends = old[0].std() <= FLAT, new[0].std() <= FLAT
        if ends or not is_another_picture(old, new):  # it fades out: the shot lasts until black ends
            return None
        frames = np.stack(window).astype(np.int16)
        whole, steps = frames[-1] - frames[0], np.diff(frames, axis=0)
        size, sign = np.abs(whole), np.sign(whole)
        good = (np.abs(steps).max(axis=0) <= JUMP * size) & ((steps * sign).min(axis=0) >= -BACK * size)
        weight, (before, after) = size * good, (self._steps[max(0, first - length // 2)][2], self._steps[-1][2])
        moves = max(0.0 if fades else _movement(frames[0], before, weight), _movement(frames[-1], after, weight))
        if weight.sum() < SHARE * size.sum() or moves > HOLD:
            return None
        alpha = ((frames - frames[0]) * (sign * good)).sum(axis=(1, 2, 3)) / weight.sum()
        index, time, _ = self._steps[first + int(np.argmax(alpha > (0.08 if fades else 0.5)))]
        return Turn(index, time, "fade" if fades else "dissolve", self._steps[last][0])


def _is_straight(window: list[Planes], stride: int, share: float) -> bool:
    """Whether enough of the picture is halfway where it should be: cheap, and mostly it is not."""
    half = (len(window) - 1) // 2
    old, middle, new = (window[i][:, ::stride, ::stride].astype(np.int16) for i in (0, half, -1))
    off, size = np.abs(middle - old - half / (len(window) - 1) * (new - old)), np.abs(new - old)
    return bool((size * (off <= STRAIGHT * size)).sum() >= share * size.sum())


def _movement(end: Int16[np.ndarray, "c h w"], beyond: Planes, weight: Int16[np.ndarray, "c h w"]) -> float:
    """The median change from an end of the window to beyond it, as a share of `weight`, where that is large."""
    large = weight >= FLOOR
    return float(np.median(np.abs(end - beyond)[large] / weight[large])) if large.any() else 0.0


@dataclass(frozen=True)
class _Look:
    """A frame, when it is shown, its picture, and how much of the one before has changed."""

    index: int
    time: float
    planes: Planes
    change: float


class PlanesDetector:
    """Our rules: a cut is a change that sticks out of those around it, leaves another picture, and lasts.

    `Gradual` has the rule for fades and dissolves. Repeated frames, as in 24 frames per second shown at 30, are left
    out: each would be a change of nothing that makes its neighbours stick out. So are damaged ones.
    """

    def __init__(self, film: Film, picture: Box, frames: Iterable[Frame]):
        self.film, self.picture, self.frames, self._gradual = film, picture, frames, Gradual(float(film.rate))
        self._looks = deque[_Look](maxlen=2 * WINDOW + 2)
        self._judged = self._now = -1  # the last frame whose change was judged, and the last one seen
        self._start = 0, 0.0  # frame and second in which the running shot began

    def __iter__(self) -> Boundaries:
        """Where shots begin, and how: a cut is known a few frames late, a dissolve by half its length."""
        tick = float(self.film.time_base)
        for frame in self.frames:
            self._now = frame.index
            if frame.damaged:
                continue
            planes, time = shrink_planes(frame, self.film, self.picture), frame.pts * tick
            amount = change(self._looks[-1].planes, planes) if self._looks else math.inf
            self._start = self._start if self._looks else (frame.index, time)
            if amount > 0:
                self._looks.append(_Look(frame.index, time, planes, amount))
            cuts = list(self._cuts())
            turn = None if cuts else self._gradual.add(frame.index, time, planes)
            yield from cuts or (self._begin(turn) if turn else ())
        yield from self._cuts(at_end=True)

    def _cuts(self, at_end: bool = False) -> Boundaries:
        """Judge the changes that enough is known about, all of them at the end."""
        looks = list(self._looks)
        for i, look in enumerate(looks[1:], 1):
            known = at_end or len(looks) - i > WINDOW or self._now - look.index >= NEAR
            if look.index <= self._judged or not known:
                continue
            self._judged, first = look.index, max(self._start[0] + 1, look.index - NEAR)
            beside = range(max(1, i - WINDOW), min(len(looks), i + WINDOW + 1))
            near = [k for k in beside if first <= looks[k].index <= look.index + NEAR]
            others = sorted(looks[k].change for k in near if k != i)[:-1]  # leaving out another cut near it
            places = min(WINDOW, look.index - 1 - self._start[0]) + min(WINDOW, self._now - look.index)
            before, after = looks[i - 1].planes, look.planes
            # Also from longer before and until later: a flash leaves the picture as it was.
            pairs = (before, after), (before, looks[near[-1]].planes), (looks[near[0] - 1].planes, after)
            usual = sum(others) / max(1, places - 1)  # fewer places where a shot begins, or the film ends
            if look.change >= RATIO * usual and all(is_another_picture(a, b) for a, b in pairs):
                yield from self._begin(Turn(look.index, look.time, "cut", look.index))

    def _begin(self, turn: Turn) -> Boundaries:
        """The boundary, unless it would end a shot that is too short."""
        frame, second = self._start
        if turn.index - frame >= SHORTEST_FRAMES or turn.time - second >= SHORTEST_SHOT:
            self._start = turn.index, turn.time
            self._gradual.forget(turn.until)
            yield turn.index, turn.kind
