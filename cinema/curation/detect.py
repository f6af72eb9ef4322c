"""Who says where shots begin: our rules on the Y, U and V planes, or PySceneDetect's.

Array axes: `c` the three planes Y, U, V; `h w` rows and columns of the picture area, shrunk; `n` a plane's own size.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, SceneDetector
from scenedetect.common import Timecode

from cinema.curation.film import Film, Frame, planes_of
from cinema.curation.frames import Box

# Seconds, not frames: PySceneDetect's default of 15 frames drops cuts 14 frames apart, and at 8 fps whole shots.
SHORTEST_SHOT = 0.3
SHORTEST_FRAMES = 8  # ours: a shot lasts this many frames or SHORTEST_SHOT, whichever is shorter
LOOK_SIZE = 256  # pixels of the longer side that PySceneDetect sees
GRID = 160  # of a shrunk plane's longer side, about
RATIO = 2.7  # a cut changes the picture so much more than the frames around it do
FLOOR = 12.0  # and by at least so much: mean change of Y, U and V together, of 255
GATE = 0.25  # and leaves another luma, by 1 - correlation, or else U and V that change by FLOOR: light changes do not
WINDOW = 2  # frames on each side that a change is compared with
PATIENCE = 8  # frames after which a change is judged by what has been seen of the frames around it

Planes = UInt8[np.ndarray, "c h w"]


@dataclass(frozen=True)
class Boundary:
    """A shot begins at frame `frame`, by a "cut", a "dissolve" or a "fade"."""

    frame: int
    kind: str = "cut"


class Detector(Protocol):
    """Finds boundaries, in order; it may answer late. It is told every frame once, then `finish`."""

    def look(self, frame: Frame) -> list[Boundary]:
        """Boundaries that this frame makes certain."""

    def finish(self) -> list[Boundary]:
        """Boundaries that the end of the film makes certain."""


# --- PySceneDetect ----------------------------------------------------------------------------------------------


class SceneDetect:
    """A detector of PySceneDetect, which sees the picture area shrunk to LOOK_SIZE, in BGR."""

    def __init__(self, film: Film, picture: Box, judge: SceneDetector):
        self.film, self.picture, self.judge = film, picture, judge
        self._index: dict[int, int] = {}  # PTS -> frame: its answers are moments
        self._last: FrameTimecode | None = None

    def look(self, frame: Frame) -> list[Boundary]:
        """As `Detector`."""
        self._index[frame.pts] = frame.index
        self._last = FrameTimecode(Timecode(pts=frame.pts, time_base=self.film.time_base), fps=self.film.rate)
        return self._boundaries(self.judge.process_frame(self._last, self._bgr(frame)))

    def finish(self) -> list[Boundary]:
        """As `Detector`."""
        return self._boundaries(self.judge.post_process(self._last)) if self._last else []

    def _boundaries(self, cuts: list[FrameTimecode]) -> list[Boundary]:
        return [Boundary(self._index[cut.pts]) for cut in cuts if cut.pts in self._index]

    def _bgr(self, frame: Frame) -> UInt8[np.ndarray, "h w 3"]:
        box, film = self.picture, self.film
        scale = min(1.0, LOOK_SIZE / max(box.right - box.left, box.bottom - box.top))
        size = {"width": max(2, round(film.width * scale)), "height": max(2, round(film.height * scale))}
        small = frame.image.reformat(**size, format="bgr24", interpolation="AREA").to_ndarray()
        left, top, right, bottom = (round(side * scale) for side in astuple(box))
        return np.ascontiguousarray(small[top : max(bottom, top + 1), left : max(right, left + 1)])


# --- ours -------------------------------------------------------------------------------------------------------


def shrink_planes(frame: Frame, film: Film, picture: Box) -> Planes:
    """The picture area of Y, U and V, all of the size of a shrunk chroma plane.

    A pixel is the mean of its block, or of 4 x 4 places spread over it where the block is larger than that: this
    costs the same at every size, and grain is still averaged away.
    """
    left, top, right, bottom = (side // 2 for side in astuple(picture))  # in chroma samples
    step = max(1, round(max(right - left, bottom - top) / GRID))
    h, w = (bottom - top) // step, (right - left) // step
    if not h or not w:
        return np.zeros((3, 1, 1), np.uint8)
    small = np.empty((3, h, w), np.uint8)
    for c, (plane, scale) in enumerate(zip(planes_of(frame.image, film), (2, 1, 1), strict=True)):
        block, stride = step * scale, max(1, step * scale // 4)
        area = plane[top * scale : top * scale + h * block, left * scale : left * scale + w * block]
        places = range(stride // 2, stride * min(block, 4), stride)
        total = np.zeros((h, w), np.uint16)
        for i in places:
            for j in places:
                total += area[i::block, j::block]
        small[c] = total // len(places) ** 2
    return small


def change(a: Planes, b: Planes) -> float:
    """Mean absolute change of each plane, added up: black and white is not diluted by its dead colours."""
    return len(a) * float((np.maximum(a, b) - np.minimum(a, b)).mean())


def luma_distance(a: Planes, b: Planes) -> float:
    """1 - correlation of the lumas; 1 where one of them is flat, as black is."""
    y, z = (x[0].astype(np.float32) - x[0].mean(dtype=np.float32) for x in (a, b))
    norm = float(np.sqrt((y * y).mean() * (z * z).mean()))
    return 1 - float((y * z).mean()) / norm if norm > 1 else 1.0


def is_another_picture(a: Planes, b: Planes) -> bool:
    """Whether more than the light differs between two frames."""
    return change(a, b) >= FLOOR and (luma_distance(a, b) >= GATE or change(a[1:], b[1:]) >= FLOOR)


@dataclass(frozen=True)
class _Change:
    """A frame unlike the one before it, and by how much; times in seconds."""

    index: int
    time: float
    amount: float
    before: Planes
    after: Planes


class PlanesDetector:
    """Our rules: a cut is a change that sticks out of those around it, is large, leaves another luma, and lasts.

    Repeated frames, as in 24 frames per second shown at 30, are left out: each would be a change of nothing that
    makes its neighbours stick out. So are damaged ones.
    """

    def __init__(self, film: Film, picture: Box):
        self.film, self.picture = film, picture
        self._last: Planes | None = None
        self._changes: deque[_Change] = deque(maxlen=2 * WINDOW + 1)
        self._judged = -1  # the last frame whose change was judged
        self._start: tuple[int, float] | None = None  # frame and second in which the running shot began

    def look(self, frame: Frame) -> list[Boundary]:
        """As `Detector`."""
        if frame.damaged:
            return []
        now, time = shrink_planes(frame, self.film, self.picture), float(frame.pts * self.film.time_base)
        if self._start is None:
            self._start = frame.index, time
        if self._last is not None and (amount := change(self._last, now)) > 0:
            self._changes.append(_Change(frame.index, time, amount, self._last, now))
        self._last = now
        return self._judge(frame.index)

    def finish(self) -> list[Boundary]:
        """As `Detector`."""
        return self._judge(None)

    def _judge(self, now: int | None) -> list[Boundary]:
        """Judge the changes that enough is known about, all of them at the end."""
        found, changes = list[Boundary](), list(self._changes)
        for i, one in enumerate(changes):
            known = now is None or len(changes) - i > WINDOW or now - one.index >= PATIENCE
            if one.index > self._judged and known:
                self._judged = one.index
                around = changes[max(0, i - WINDOW) : i] + changes[i + 1 : i + 1 + WINDOW]
                if self._is_cut(one, around, changes[-1].after):
                    self._start = one.index, one.time
                    found.append(Boundary(one.index))
        return found

    def _is_cut(self, one: _Change, around: list[_Change], later: Planes) -> bool:
        if one.amount < RATIO * sum(c.amount for c in around) / max(1, len(around)):
            return False
        lasts = is_another_picture(one.before, one.after) and is_another_picture(one.before, later)  # a flash does not
        return lasts and self._is_long_enough(one.index, one.time)

    def _is_long_enough(self, index: int, time: float) -> bool:
        """Whether the running shot, if it ended before this frame, would not be too short."""
        first, began = self._start or (0, 0.0)
        return index - first >= SHORTEST_FRAMES or time - began >= SHORTEST_SHOT


DETECTORS: dict[str, Callable[[Film, Box], Detector]] = {
    "planes": PlanesDetector,
    "content": lambda film, box: SceneDetect(film, box, ContentDetector(min_scene_len=SHORTEST_SHOT)),
    "adaptive": lambda film, box: SceneDetect(film, box, AdaptiveDetector(min_scene_len=SHORTEST_SHOT)),
    # Hue and saturation are dead in black and white and alike within a set: they only dilute luma. PySceneDetect's
    # "luma" is HSV's value, the largest of R, G and B: a cut from pure blue to pure yellow leaves it as it is.
    "adaptive-luma": lambda film, box: SceneDetect(
        film, box, AdaptiveDetector(min_scene_len=SHORTEST_SHOT, luma_only=True)
    ),
}
DETECTOR = "planes"
