from pathlib import Path

import numpy as np
from PIL import Image

from cinema.viz import GAP, PAPER, film_strip


def flat(colour: str, size: tuple[int, int] = (64, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_frames_stand_in_rows_in_order() -> None:
    strip = film_strip([flat("red"), flat("lime"), flat("blue")], columns=2, width=64)
    assert strip.size == (2 * 64 + 3 * GAP, 2 * 32 + 3 * GAP)
    centres = [(GAP + 32, GAP + 16), (2 * GAP + 96, GAP + 16), (GAP + 32, 2 * GAP + 48)]
    assert [strip.getpixel(p) for p in centres] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert strip.getpixel((2, 2)) == strip.getpixel((2 * GAP + 96, 2 * GAP + 48)) == PAPER


def test_captions_add_room_below_and_stay_under_their_frame() -> None:
    words = "wide shot, forest. <ada> left, jumping: red round, crown. pan left."
    strip = film_strip([flat("red"), flat("red")], ["short", words], width=200)
    assert strip.height > film_strip([flat("red"), flat("red")], width=200).height + 20
    ink = (np.asarray(strip) != PAPER).any(-1)
    assert not ink[:, GAP + 200 : 2 * GAP + 200].any() and not ink[-2:].any()  # the gap between, the last rows


def test_numbers_are_those_given() -> None:
    pictures, words = [flat("red")] * 2, ["a", "b"]
    counted, given = film_strip(pictures, words), film_strip(pictures, words, numbers=[1, 2])
    assert counted.tobytes() == given.tobytes() != film_strip(pictures, words, numbers=[7, 8]).tobytes()


def test_paths_will_do(tmp_path: Path) -> None:
    flat("red").save(tmp_path / "a.png")
    assert film_strip([tmp_path / "a.png"], width=64).tobytes() == film_strip([flat("red")], width=64).tobytes()
