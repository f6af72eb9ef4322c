"""One film, from its file to its shots and their keyframes: all of curation that looks at pixels."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cinema.curation.film import Film, FrameReader
from cinema.curation.frames import Box, find_borders, is_blank, keyframe_image, to_jpeg
from cinema.curation.shots import Timeline, find_shots
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
    picture, n = find_borders(film), film.expected_frames
    line = find_shots(film, picture, detector, lambda i: on_progress(min(0.5, 0.5 * i / n), "finding cuts"))
    rows = _rows(film, line, picture, height, lambda i: on_progress(min(1.0, 0.5 + 0.5 * i / n), "keyframes"))
    lasts = float((line.end_pts - line.pts[0]) * film.time_base)
    return Scan(rows, len(line.pts), sum(line.damaged), line.errors, float(line.pts[-1] * film.time_base), lasts)


def _rows(film: Film, line: Timeline, picture: Box, height: int, on_frame: Callable[[int], None]) -> list[CuratedShot]:
    """Every shot with its keyframe, no captions yet; blank and broken ones are set aside."""
    middles = [line.middle(start, end) for start, end in line.spans()]
    wanted = set(middles)
    images: dict[int | None, tuple[bytes | None, str]] = {None: (None, "no frame of it is free of decoding errors")}
    for frame in FrameReader(film):  # from the start again: seeking lands beside the frame in some containers
        on_frame(frame.index)
        if frame.index in wanted:
            pixels = keyframe_image(frame.image, film, picture, height)
            images[frame.index] = to_jpeg(pixels), "blank frame" if is_blank(pixels) else ""
    seconds = [float(pts * film.time_base) for pts in (*line.pts, line.end_pts)]
    fixed: dict[str, Any] = {f"crop_{side}": at for side, at in asdict(picture).items()}
    fixed["time_base"] = str(film.time_base)
    rows = list[CuratedShot]()
    for (start, end), middle in zip(line.spans(), middles, strict=True):
        image, reason = images[middle]
        times: dict[str, Any] = {"start_s": seconds[start], "end_s": seconds[end], "start_frame": start}
        times |= {"end_frame": end, "keyframe_s": None if middle is None else seconds[middle]}
        rows.append(CuratedShot(len(rows), **times, **fixed, image=image, kept=not reason, reason=reason))
    return rows
