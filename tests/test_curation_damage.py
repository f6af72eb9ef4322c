"""Sixty damaged and odd films: every good frame is kept, every loss that a decoder notices is named."""

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from test_curation import make_film, make_sound

from cinema.curation import NoAnnotator, curate
from cinema.curation.film import Box, probe, read_frames
from cinema.curation.frames import keyframe_image, scan_film
from cinema.curation.shots import Timeline, cut_film
from cinema.curation.store import CuratedShot
from cinema.errors import UserError

LENGTHS = [14, 12, 14]


def scan_of(path: Path) -> tuple[list[CuratedShot], Timeline]:
    line = Timeline()
    rows = list(scan_film(probe(path), 32, "planes", line, lambda share, message: None))
    assert rows[0].start_frame == 0 and rows[-1].end_frame == len(line.pts)
    assert all((a.end_frame, a.end_s) == (b.start_frame, b.start_s) for a, b in pairwise(rows))
    for row in rows:
        assert row.start_s < row.end_s and (row.keyframe_s is None or row.start_s <= row.keyframe_s < row.end_s)
        assert (row.image is None) == (row.keyframe_s is None) and (row.image is not None or row.reason)
    return rows, line


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    kinds = {"a.ts": {}, "a.mkv": {}, "a.avi": {"codec": "mpeg4"}, "a.mp4": {"options": {"movflags": "faststart"}}}
    return [make_film(folder / name, LENGTHS, **settings) for name, settings in kinds.items()]


@pytest.mark.parametrize("k", range(20))
def test_a_film_cut_off_anywhere_keeps_what_is_there(streams, tmp_path, k):
    whole = streams[k % len(streams)]
    data = whole.read_bytes()
    path = tmp_path / whole.name
    path.write_bytes(data[: len(data) * (k + 1) // 21])
    try:
        film = probe(path)
        frames = list(read_frames(film))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    if not frames:
        with pytest.raises(UserError, match="not one frame"):
            scan_of(path)
        return
    _, line = scan_of(path)
    assert (len(line.pts), sum(line.damaged)) == (len(frames), sum(f.damaged for f in frames))


@pytest.mark.parametrize("k", range(26))
def test_flipped_bits_lose_only_what_they_hit(streams, tmp_path, k):
    whole = streams[k % len(streams)]
    rng = np.random.default_rng(k)
    data = bytearray(whole.read_bytes())
    for at in rng.integers(len(data) // 4, len(data), 2 + k):
        data[at] ^= 1 << int(rng.integers(8))
    path = tmp_path / whole.name
    path.write_bytes(data)
    damaged = {f.pts for f in read_frames(probe(path)) if f.damaged}
    rows, line = scan_of(path)
    assert len(line.pts) > 0 and len(damaged) == sum(line.damaged)
    base = probe(path).time_base
    assert not any(row.keyframe_s is not None and round(row.keyframe_s / base) in damaged for row in rows)


def test_odd_films_are_curated_and_hopeless_ones_are_named(tmp_path):
    odd = {
        "with a space.mp4": {},
        "two\nlines.mkv": {},
        "1 frame.mkv": {"lengths": [1]},
        "131x67.mkv": {"size": (131, 67), "codec": "ffv1", "pixels": "yuv444p"},
        "98x50.mkv": {"size": (98, 50), "codec": "ffv1"},
        "ten bit.mkv": {"codec": "ffv1", "pixels": "yuv422p10le"},
        "turned.mp4": {"turned": 90},
        "varying.mkv": {"ticks": [40 * i + 7 * (i % 3) for i in range(40)]},
    }
    good = []
    for name, settings in odd.items():
        good.append(make_film(tmp_path / name, settings.pop("lengths", LENGTHS), **settings))
    wrong = make_film(tmp_path / "x.mkv", LENGTHS).rename(tmp_path / "really matroska.avi")
    no_index = make_film(tmp_path / "no index.mp4", LENGTHS)
    no_index.write_bytes(no_index.read_bytes()[: no_index.stat().st_size // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    bad = [no_index, tmp_path / "empty.mp4", tmp_path / "noise.mp4", loop, make_sound(tmp_path / "sound.m4a")]
    report = curate([*good, wrong, *bad], tmp_path / "out", annotator=NoAnnotator(), height=32)
    by_name = {one.film.name: one for one in report.films}
    assert [one.film for one in report.failed] == bad and all(one.reason for one in report.failed)
    for film in [*good, wrong]:
        expected = 1 if film.name == "1 frame.mkv" else 3
        assert (by_name[film.name].shots, by_name[film.name].status) == (expected, "ok"), film.name


@pytest.mark.parametrize(("name", "codec", "most"), [("a.mp4", "libx264", 0.1), ("a.mpg", "mpeg2video", 0.0)])
def test_keyframes_of_a_damaged_film_are_those_of_the_whole_one(tmp_path, name, codec, most):
    # A decoder does not notice every flipped bit: H.264 decodes some to a picture that is wrong in part.
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        steady = {"mbtree": "0"} if codec == "libx264" else {}  # with it, x264 writes other bytes every time
        stream = container.add_stream(codec, rate=24, options={"g": "24", "threads": "1", **steady})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 160, 96, "yuv420p", 600_000
        noise = np.random.default_rng(1).integers(40, 210, (4, 12, 40, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        for number in range(120):  # four shots, each a slow pan
            shown = np.ascontiguousarray(noise[number // 30, :, number % 30 : number % 30 + 160])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode(None))
    film, whole, kept, wrong = probe(path), path.read_bytes(), 0, []
    clean = {f.pts: keyframe_image(f.image, film, Box(0, 0, 160, 96), 32).astype(int) for f in read_frames(film)}
    for seed in range(20):
        rng, damaged = np.random.default_rng(seed), bytearray(whole)
        for at in rng.integers(len(whole) // 10, len(whole) * 9 // 10, 5):
            damaged[at] ^= 1 << int(rng.integers(8))
        broken = tmp_path / f"{seed}{path.suffix}"
        broken.write_bytes(damaged)
        line = Timeline()
        for shot in cut_film(probe(broken), Box(0, 0, 160, 96), "planes", line):
            if shot.middle and shot.middle.pts in clean:
                kept += 1
                seen = keyframe_image(shot.middle.image, film, Box(0, 0, 160, 96), 32)
                if np.abs(seen - clean[shot.middle.pts]).mean() > 12:
                    wrong.append((seed, shot.start))
    assert kept > 40 and len(wrong) <= most * kept, wrong
