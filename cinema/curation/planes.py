"""A film's pictures as its cut rules see them: small Y, U and V planes, and how far two of them are apart.

Array axes: `c` the planes Y, U, V, or U and V alone; `h w` rows and columns of the picture area, shrunk.
"""

from dataclasses import astuple

import numpy as np
from jaxtyping import UInt8

from cinema.curation.film import Film, Frame, planes_of
from cinema.curation.frames import Box

GRID = 160  # of a shrunk plane's longer side, about
FLOOR = 12.0  # another picture changes Y, U and V together by so much on average, of 255
GATE = 0.25  # and leaves another luma, by 1 - correlation, or else U and V that change by FLOOR: light changes do not
FLAT = 3.0  # standard deviation of luma up to which nothing is seen, as in black

Planes = UInt8[np.ndarray, "c h w"]


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


def is_flat(planes: Planes) -> bool:
    """Whether a frame shows nothing."""
    return float(planes[0].std()) <= FLAT
