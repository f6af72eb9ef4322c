"""Where shots begin and end, by PySceneDetect, and the middle frame of each."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import astuple, dataclass

import av
import numpy as np
from jaxtyping import UInt8
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, SceneDetector
from scenedetect.common import Timecode

from cinema.curation.film import Film, Frame, FrameReader
from cinema.curation.frames import Box
from cinema.errors import UserError

# Seconds, not frames: PySceneDetect's default of 15 frames drops cuts 14 frames apart, and at 8 fps whole shots.
SHORTEST_SHOT = 0.3
DETECTORS: dict[str, Callable[[], SceneDetector]] = {
    "content": lambda: ContentDetector(min_scene_len=SHORTEST_SHOT),
    "adaptive": lambda: AdaptiveDetector(min_scene_len=SHORTEST_SHOT),
    # Hue and saturation are dead in black and white and alike within a set: they only dilute luma. PySceneDetect's
    # "luma" is HSV's value, the largest of R, G and B: a cut from pure blue to pure yellow leaves it as it is.
    "adaptive-luma": lambda: AdaptiveDetector(min_scene_len=SHORTEST_SHOT, luma_only=True),
}
DETECTOR = "adaptive-luma"
LOOK_SIZE = 256  # pixels of the longer side that the detector sees


@dataclass(frozen=True)
class Timeline:
    """What one pass over a film found out; its shots tile it."""

    pts: list[int]  # of every frame, strictly increasing
    end_pts: int  # when the last frame ends
    damaged: list[bool]  # per frame, whether its pixels can not be trusted
    cuts: list[int]  # first frames of all shots, beginning with 0
    errors: int  # packets that could not be decoded

    def spans(self) -> list[tuple[int, int]]:
        """(first frame, frame after the last) of every shot."""
        return list(zip(self.cuts, [*self.cuts[1:], len(self.pts)], strict=True))

    def middle(self, start: int, end: int) -> int | None:
        """The undamaged frame of a shot that is nearest to the one shown halfway in time; None if there is none."""
        halfway = (self.pts[start] + (self.pts[end] if end < len(self.pts) else self.end_pts)) / 2
        shown = bisect_right(self.pts, halfway, start, end) - 1
        good = (i for i in range(start, end) if not self.damaged[i])
        return min(good, key=lambda i: abs(i - shown), default=None)


def find_shots(film: Film, picture: Box, detector: str, on_frame: Callable[[int], None] | None = None) -> Timeline:
    """Decode a film once and cut it into shots, looking only at the picture area.

    `detector` is one of DETECTORS; `on_frame` is told the index of every frame. Raises UserError if there is none.
    """
    judge, reader = DETECTORS[detector](), FrameReader(film)
    pts, damaged, found, end = list[int](), list[bool](), set[int](), 0
    for frame in reader:
        pts.append(frame.pts)
        damaged.append(frame.damaged)
        end = frame.end_pts
        cuts = judge.process_frame(_moment(frame, film), _look(frame.image, film, picture))
        found.update(cut.pts for cut in cuts)  # detectors may answer some frames late
        if on_frame:
            on_frame(frame.index)
    if not pts:
        raise UserError(f"{film.path}: not one frame could be decoded; the file is damaged")
    found.update(cut.pts for cut in judge.post_process(_moment(frame, film)))
    return Timeline(pts, end, damaged, [i for i, p in enumerate(pts) if i == 0 or p in found], reader.errors)


def _moment(frame: Frame, film: Film) -> FrameTimecode:
    return FrameTimecode(Timecode(pts=frame.pts, time_base=film.time_base), fps=film.rate)


def _look(image: av.VideoFrame, film: Film, picture: Box) -> UInt8[np.ndarray, "h w 3"]:
    """The picture area of a frame, small, BGR: what the detector sees."""
    scale = min(1.0, LOOK_SIZE / max(picture.right - picture.left, picture.bottom - picture.top))
    size = {"width": max(2, round(film.width * scale)), "height": max(2, round(film.height * scale))}
    small = image.reformat(**size, format="bgr24", interpolation="AREA").to_ndarray()
    left, top, right, bottom = (round(side * scale) for side in astuple(picture))
    return np.ascontiguousarray(small[top : max(bottom, top + 1), left : max(right, left + 1)])
