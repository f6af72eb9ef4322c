"""One film, from its file to its shots and their keyframes: all of curation that looks at pixels."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from cinema.curation.film import Film
from cinema.curation.filters import Filters
from cinema.curation.frames import Box, find_borders, keyframe_image, to_jpeg
from cinema.curation.shots import CutShot, Timeline, cut_film
from cinema.curation.store import CuratedShot


@dataclass(frozen=True)
class Scan:
    """What looking at a film found.

    Attributes:
        rows: its shots in order, without captions; they tile the film.
        frames, damaged: frames decoded, and those whose pixels can not be trusted.
        errors: packets that could not be decoded.
        last_pts_s: when the last frame is shown, in seconds.
        lasts_s: seconds from the first frame's beginning to the last one's end.
    """

    rows: list[CuratedShot]
    frames: int
    damaged: int
    errors: int
    last_pts_s: float
    lasts_s: float


def scan_film(film: Film, height: int, detector: str, on_progress: Callable[[float, str], None]) -> Scan:
    """Find a film's picture area, its shots, and a keyframe of each, `height` x `2 * height` pixels.

    `detector` is one of `shots.DETECTORS`; `on_progress` is told the share done, 0 to 1, and what is happening.

    Raises:
        UserError: not one frame can be decoded.
    """
    on_progress(0.0, "looking for borders")
    picture, line, expected = find_borders(film), Timeline(), film.expected_frames
    rows, filters = list[CuratedShot](), Filters()
    for shot in cut_film(film, picture, detector, line, lambda i: on_progress(min(1.0, i / expected), "finding cuts")):
        rows.append(_row(film, shot, len(rows), picture, height, filters))
    lasts = float((line.end_pts - line.pts[0]) * film.time_base)
    return Scan(rows, len(line.pts), sum(line.damaged), line.errors, float(line.pts[-1] * film.time_base), lasts)


def _row(film: Film, shot: CutShot, number: int, picture: Box, height: int, filters: Filters) -> CuratedShot:
    """A shot with its keyframe, no caption yet; one that is no use is set aside."""

    def seconds(pts: int) -> float:
        return float(pts * film.time_base)

    image, reason, middle = None, "no frame of it is free of decoding errors", shot.middle
    scores: dict[str, tuple[float, float]] = {"damaged": (shot.damaged / (shot.end - shot.start), 1.0)}
    if middle:
        pixels = keyframe_image(middle.image, film, picture, height)
        found = filters.judge(pixels)
        image, reason, scores = to_jpeg(pixels), found.reason, scores | found.scores
    return CuratedShot(
        shot=number,
        start_s=seconds(shot.start_pts),
        end_s=seconds(shot.end_pts),
        start_frame=shot.start,
        end_frame=shot.end,
        time_base=str(film.time_base),
        keyframe_s=seconds(middle.pts) if middle else None,
        **{f"crop_{side}": at for side, at in asdict(picture).items()},
        image=image,
        kept=not reason,
        reason=reason,
        transition=shot.transition,
        scores=json.dumps(scores),
    )
