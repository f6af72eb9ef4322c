from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from PIL import Image

from cinema.media import film_writer, write_captions

COLOURS = [(214, 62, 52), (74, 160, 78), (62, 98, 214), (243, 240, 232), (0, 0, 0), (255, 255, 255)]


def read_frames(path: Path) -> list[Image.Image]:
    """All frames of a film, RGB; rounded, else a level too dark."""
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(str(path)) as container:
        return [frame.to_image(interpolation=exact) for frame in container.decode(video=0)]


def write(path: Path, colours: list[tuple[int, int, int]], crf: int = 18) -> Path:
    with film_writer(path, 64, 32, 8, crf) as add:
        for colour in colours:
            add(Image.new("RGB", (64, 32), colour))
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
        with film_writer(tmp_path / f"{i}.mp4", 224, 112, 8) as add:
            for k in range(12):
                add(Image.fromarray(noise[:, 3 * k : 3 * k + 224]))
        written.add((tmp_path / f"{i}.mp4").read_bytes())
    assert len(written) == 1


def test_a_lower_rate_factor_is_closer_and_larger(tmp_path: Path) -> None:
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 64, 3), np.uint8)) for i in range(3)]
    errors, sizes = [], []
    for crf in (10, 40):
        with film_writer(tmp_path / "n.mp4", 64, 32, 8, crf) as add:
            for image in noise:
                add(image)
        frames = read_frames(tmp_path / "n.mp4")
        errors.append(sum(np.square(np.asarray(a, float) - b).mean() for a, b in zip(frames, noise, strict=True)))
        sizes.append((tmp_path / "n.mp4").stat().st_size)
    assert errors[0] < errors[1] and sizes[0] > sizes[1]


def test_what_fails_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        with film_writer(path, 64, 32, 8) as add:
            add(Image.new("RGB", (64, 32)))
            raise RuntimeError("the camera broke")

    old = write(tmp_path / "old.mp4", COLOURS).read_bytes()
    for name in ("new.mp4", "old.mp4"):
        with pytest.raises(RuntimeError, match="the camera broke"):
            fail(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["old.mp4"] and (tmp_path / "old.mp4").read_bytes() == old


def test_vp9_in_webm_comes_back_in_order_and_colour_and_the_same(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, COLOURS, crf=10) for name in ("a.webm", "b.webm"))
    assert first.read_bytes() == second.read_bytes()
    frames = read_frames(first)
    assert len(frames) == len(COLOURS)
    for frame, colour in zip(frames, COLOURS, strict=True):
        assert np.abs((np.asarray(frame, float) - colour).mean((0, 1))).max() < 3
    with av.open(str(first)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("vp9", "yuv420p")


SHOTS = [("<ada> & co, at home.", 2), ("a\nwide shot", 4)]


@pytest.mark.parametrize("ending", [".mp4", ".webm"])
def test_every_shot_is_a_chapter(tmp_path: Path, ending: str) -> None:
    path = (tmp_path / "a").with_suffix(ending)
    with film_writer(path, 64, 32, 8, shots=SHOTS) as add:
        for colour in COLOURS:
            add(Image.new("RGB", (64, 32), colour))
    with av.open(str(path)) as container:
        chapters = container.chapters()
    assert [c["metadata"]["title"] for c in chapters] == [caption for caption, _ in SHOTS]
    spans = [(c["start"] * c["time_base"], c["end"] * c["time_base"]) for c in chapters]
    assert spans == [(0, Fraction(1, 4)), (Fraction(1, 4), Fraction(3, 4))]


def test_captions_are_a_track_of_escaped_cues(tmp_path: Path) -> None:
    write_captions(tmp_path / "a.vtt", [*SHOTS, ("late", 8 * 3600)], 8)
    assert (tmp_path / "a.vtt").read_text() == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:00.250\n&lt;ada&gt; &amp; co, at home.\n"
        "\n00:00:00.250 --> 00:00:00.750\na wide shot\n\n00:00:00.750 --> 01:00:00.750\nlate\n"
    )
