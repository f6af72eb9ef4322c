"""One pass over a film: its shots, and of each the frame halfway in time, without holding more than a few frames."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cinema.curation.detect import DETECTOR, DETECTORS, SHORTEST_SHOT, Boundary
from cinema.curation.film import Film, Frame, FrameReader
from cinema.curation.frames import Box
from cinema.errors import UserError

__all__ = ["DETECTOR", "DETECTORS", "SHORTEST_SHOT", "CutShot", "Keeper", "Timeline", "cut_film"]
ROOM = 40  # decoded frames held at once: 124 MB at 1080p; 34 would do for a 24th of a shot at 24 frames a second
LATENESS_S, LATENESS_FRAMES = 4.0, 100  # how late a detector may answer; a frame older than both is in this shot


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
    """What has been seen of a film so far; `end_pts` is when the last frame ends."""

    pts: list[int] = field(default_factory=list)
    damaged: list[bool] = field(default_factory=list)
    end_pts: int = 0
    errors: int = 0


class Keeper:
    """Holds frames of the running shot, at most ROOM, so that whenever it ends its middle frame is among them.

    The middle of a shot that is still running moves forward, at half the speed of time: what lies before it is let
    go. A frame `x` seconds into the shot becomes the middle one of a shot of `2 x` seconds, so for an error of 1/24
    of it, frames there may lie `x / 6` seconds apart. A cut that is told late ends the shot in the past, and the
    frames after it are a new one: a frame of age `a` may be the middle of that, so there `a / 6` is close enough.
    When there is no room, the frame that is least needed goes.
    """

    def __init__(self, film: Film):
        self.film, self.frames, self._start = film, list[Frame](), 0
        self._late = max(LATENESS_FRAMES / float(film.rate), LATENESS_S) / float(film.time_base)

    def add(self, frame: Frame) -> None:
        """Take in the next frame of the film, unless it is damaged."""
        if not frame.damaged:
            self.frames.append(frame)
            if len(self.frames) > ROOM:
                self.frames.pop(self._least_needed())

    def cut(self, index: int, start_pts: int, end_pts: int) -> Frame | None:
        """The frame nearest to the middle of the shot that ends before frame `index`, at `end_pts`; forget the shot.

        None if no frame of it is whole.
        """
        halfway = (start_pts + end_pts) / 2
        shot = [f for f in self.frames if f.index < index]
        self.frames, self._start = self.frames[len(shot) :], end_pts
        return min(shot, key=lambda f: max(f.pts - halfway, halfway - f.end_pts, 0), default=None)

    def _least_needed(self) -> int:
        """Which of the frames held, except the last two, can be missed best."""
        now, start, frames = self.frames[-1].pts, self._start, self.frames
        if frames[1].pts <= (start + max(start, now - self._late)) / 2:
            return 0  # the middle has passed the frame after it
        return min(range(1, len(frames) - 2), key=lambda i: self._spacing(i, now))

    def _spacing(self, i: int, now: int) -> float:
        """How far apart the frames beside frame `i` are, as a multiple of what is close enough there."""
        before, frame, after = self.frames[i - 1 : i + 2]
        age, into = now - frame.pts, frame.pts - self._start
        return (after.pts - before.pts) / max(1, into if age > self._late else min(age, into))


def cut_film(
    film: Film, picture: Box, detector: str, line: Timeline, on_frame: Callable[[int], None] | None = None
) -> Iterator[CutShot]:
    """Decode a film once and give its shots as they end; they tile it.

    Args:
        film, picture: the film and its picture area, outside of which nothing is looked at.
        detector: one of DETECTORS.
        line: is filled on the way.
        on_frame: told the index of every frame.

    Raises:
        UserError: not one frame can be decoded.
    """
    judge, reader, keeper = DETECTORS[detector](film, picture), FrameReader(film), Keeper(film)
    begun = Boundary(0)

    def end_shot(end: int, end_pts: int) -> CutShot:
        start_pts, damaged = line.pts[begun.frame], sum(line.damaged[begun.frame : end])
        middle = keeper.cut(end, start_pts, end_pts)
        return CutShot(begun.frame, end, start_pts, end_pts, begun.kind, damaged, middle)

    for frame in reader:
        line.pts.append(frame.pts)
        line.damaged.append(frame.damaged)
        line.end_pts, line.errors = frame.end_pts, reader.errors
        keeper.add(frame)
        for found in judge.look(frame):
            yield end_shot(found.frame, line.pts[found.frame])
            begun = found
        if on_frame:
            on_frame(frame.index)
    line.errors = reader.errors
    if not line.pts:
        raise UserError(f"{film.path}: not one frame could be decoded; the file is damaged")
    for found in judge.finish():
        yield end_shot(found.frame, line.pts[found.frame])
        begun = found
    yield end_shot(len(line.pts), line.end_pts)
