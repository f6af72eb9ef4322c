"""Who says where shots begin: our rules on the Y, U and V planes, or PySceneDetect's.

Array axes: `h w` rows and columns of the picture area, shrunk.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, SceneDetector
from scenedetect.common import Timecode

from cinema.curation.film import Film, Frame
from cinema.curation.frames import Box
from cinema.curation.gradual import Gradual
from cinema.curation.planes import Planes, change, is_another_picture, shrink_planes

# Seconds, not frames: PySceneDetect's default of 15 frames drops cuts 14 frames apart, and at 8 fps whole shots.
SHORTEST_SHOT = 0.3
SHORTEST_FRAMES = 8  # ours: a shot lasts this many frames or SHORTEST_SHOT, whichever is shorter
LOOK_SIZE = 256  # pixels of the longer side that PySceneDetect sees
RATIO = 3.0  # a cut changes the picture so much more than the frames around it do
WINDOW = 2  # changes on each side that a change is compared with
NEAR = 6  # frames beyond which they tell nothing, and after which a change is judged by those there are


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


@dataclass(frozen=True)
class _Change:
    """A frame unlike the one before it, and by how much; times in seconds."""

    index: int
    time: float
    amount: float
    before: Planes
    after: Planes


class PlanesDetector:
    """Our rules: a cut is a change that sticks out of those around it, leaves another picture, and lasts.

    `Gradual` has the rule for fades and dissolves.

    Repeated frames, as in 24 frames per second shown at 30, are left out: each would be a change of nothing that
    makes its neighbours stick out. So are damaged ones.
    """

    def __init__(self, film: Film, picture: Box):
        self.film, self.picture = film, picture
        self._last: Planes | None = None
        self._changes: deque[_Change] = deque(maxlen=2 * WINDOW + 1)
        self._now, self._judged = 0, -1  # the last frame seen, and the last whose change was judged
        self._start: tuple[int, float] | None = None  # frame and second in which the running shot began
        self._gradual = Gradual(float(film.rate))

    def look(self, frame: Frame) -> list[Boundary]:
        """As `Detector`."""
        self._now = frame.index
        if frame.damaged:
            return []
        now, time = shrink_planes(frame, self.film, self.picture), float(frame.pts * self.film.time_base)
        if self._start is None:
            self._start = frame.index, time
        if self._last is not None and (amount := change(self._last, now)) > 0:
            self._changes.append(_Change(frame.index, time, amount, self._last, now))
        self._last = now
        return self._judge(frame.index) or self._joined(frame.index, time, now)

    def finish(self) -> list[Boundary]:
        """As `Detector`."""
        return self._judge(None)

    def _judge(self, now: int | None) -> list[Boundary]:
        """Judge the changes that enough is known about, all of them at the end."""
        found, changes = list[Boundary](), list(self._changes)
        for i, one in enumerate(changes):
            known = now is None or len(changes) - i > WINDOW or now - one.index >= NEAR
            if one.index > self._judged and known:
                self._judged = one.index
                around = [c for c in changes[max(0, i - WINDOW) : i + 1 + WINDOW] if abs(c.index - one.index) <= NEAR]
                if self._is_cut(one, around):
                    found.append(self._begin(one.index, one.time, "cut"))
        return found

    def _joined(self, index: int, time: float, now: Planes) -> list[Boundary]:
        """The fade or dissolve that is over with this frame."""
        blend = self._gradual.add(index, time, now)
        if blend is None or not self._is_long_enough(blend.index, blend.time):
            return []
        self._gradual.forget(blend.until)
        return [self._begin(blend.index, blend.time, blend.kind)]

    def _begin(self, index: int, time: float, kind: str) -> Boundary:
        self._start = index, time
        self._gradual.forget(index)
        return Boundary(index, kind)

    def _is_cut(self, one: _Change, around: list[_Change]) -> bool:
        """Whether a change is a cut, given it and those near it, in order."""
        others = [c.amount for c in around if c is not one]
        places = min(WINDOW, one.index - 1) + min(WINDOW, self._now - one.index)  # fewer at the ends of the film
        usual = (sum(others) - max(others, default=0.0)) / max(1, places - 1)  # leaving out another cut near it
        if one.amount < RATIO * usual or not self._is_long_enough(one.index, one.time):
            return False
        pairs = (one.before, one.after), (one.before, around[-1].after), (around[0].before, one.after)
        return all(is_another_picture(a, b) for a, b in pairs)  # the last two say that it is no flash

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
