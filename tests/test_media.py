from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cinema.errors import UserError
from cinema.media import FilmWriter, read_frames

COLOURS = [(214, 62, 52), (74, 160, 78), (62, 98, 214), (243, 240, 232), (0, 0, 0), (255, 255, 255)]


def write(path: Path, colours: list[tuple[int, int, int]], crf: int = 18) -> Path:
    with FilmWriter(path, 64, 32, 8, crf) as film:
        for colour in colours:
            film.add(Image.new("RGB", (64, 32), colour))
    return path


def test_frames_come_back_in_order_and_colour(tmp_path: Path) -> None:
    frames = read_frames(write(tmp_path / "a.mp4", COLOURS))
    assert [f.size for f in frames] == [(64, 32)] * len(COLOURS)
    for frame, colour in zip(frames, COLOURS, strict=True):
        error = np.asarray(frame, float) - colour
        assert np.abs(error.mean((0, 1))).max() < 2  # levels: 8-bit YUV, and x264 at crf 18


def test_a_browser_plays_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", COLOURS)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")  # the index comes first: it plays while it loads
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.mp4", COLOURS), write(tmp_path / "b.mp4", COLOURS)
    assert first.read_bytes() == second.read_bytes()


def test_pictures_that_move_give_the_same_bytes_at_odd_places(tmp_path: Path) -> None:
    """Widths that are no multiple of 64, at which x264's defaults differ from run to run."""
    noise = np.random.default_rng(0).integers(0, 255, (112, 260, 3), np.uint8)
    written = set()
    for i in range(6):
        with FilmWriter(tmp_path / f"{i}.mp4", 224, 112, 8) as film:
            for k in range(12):
                film.add(Image.fromarray(noise[:, 3 * k : 3 * k + 224]))
        written.add((tmp_path / f"{i}.mp4").read_bytes())
    assert len(written) == 1


def test_a_lower_rate_factor_is_closer_and_larger(tmp_path: Path) -> None:
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 64, 3), np.uint8)) for i in range(3)]
    errors, sizes = [], []
    for crf in (10, 40):
        with FilmWriter(tmp_path / "n.mp4", 64, 32, 8, crf) as film:
            for image in noise:
                film.add(image)
        frames = read_frames(tmp_path / "n.mp4")
        errors.append(sum(np.square(np.asarray(a, float) - b).mean() for a, b in zip(frames, noise, strict=True)))
        sizes.append((tmp_path / "n.mp4").stat().st_size)
    assert errors[0] < errors[1] and sizes[0] > sizes[1]


def test_what_fails_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        with FilmWriter(path, 64, 32, 8) as film:
            film.add(Image.new("RGB", (64, 32)))
            raise RuntimeError("the camera broke")

    old = write(tmp_path / "old.mp4", COLOURS).read_bytes()
    for name in ("new.mp4", "old.mp4"):
        with pytest.raises(RuntimeError, match="the camera broke"):
            fail(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["old.mp4"] and (tmp_path / "old.mp4").read_bytes() == old


def test_no_frames_is_no_film(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one frame"), FilmWriter(tmp_path / "a.mp4", 64, 32, 8):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "size"), [("a.mp4", (63, 32)), ("a.mp4", (64, 0)), ("a.avi", (64, 32))])
def test_what_cannot_be_written(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"a\."):
        FilmWriter(tmp_path / name, *size, 8)


def test_a_frame_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32"), FilmWriter(tmp_path / "a.mp4", 64, 32, 8) as film:
        film.add(Image.new("RGB", (32, 32)))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp4", COLOURS).read_bytes()
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 4])
    for name in ("missing.mp4", "text.mp4", "cut.mp4"):
        with pytest.raises(UserError, match=name):
            read_frames(tmp_path / name)
