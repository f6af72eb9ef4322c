import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scenedetect import ContentDetector, SceneManager, open_video

from cinema.curation import GroundTruthAnnotator, NoAnnotator, StoppedError, curate, curate_film, read_film, story_of
from cinema.curation.film import Box, Film, probe, read_frames
from cinema.curation.frames import find_borders, keyframe_image
from cinema.curation.run import FilmReport
from cinema.curation.shots import DETECTOR, SHORTEST_SHOT, Timeline, cut_film
from cinema.curation.store import CuratedFilm, CuratedShot, read_rows, write_film
from cinema.errors import UserError
from cinema.story import Character

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
# Neighbours differ in their largest channel, which is all that the default detector looks at.
COLOURS = [(200, 40, 40), (40, 160, 60), (60, 60, 220), (130, 60, 160), (220, 200, 60), (230, 230, 230)]
BITS = 7  # a frame carries its number as black and white blocks, in Gray code: one block changes from frame to frame


def picture(number: int, shot: int, width: int, height: int) -> np.ndarray:
    """One frame: a ramp in the shot's colour, a square that moves, and the frame's number along the lower edge."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[:] = np.linspace(0.6, 1.0, width)[None, :, None] * np.array(COLOURS[shot % len(COLOURS)])
    side, x = height // 4, (5 * number) % (width - height // 4)
    frame[height // 4 : height // 4 + side, x : x + side] = 255 - np.array(COLOURS[shot % len(COLOURS)])
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        frame[-height // 4 :, left:right] = 255 if (number ^ number >> 1) >> bit & 1 else 0
    return frame


def number_in(image: bytes | None) -> int:
    """The frame number that a keyframe of a 2:1 film shows."""
    assert image
    strip = np.asarray(Image.open(BytesIO(image)).convert("L"))
    strip = strip[-strip.shape[0] // 6 :]
    parts = np.array_split(strip, BITS, axis=1)
    gray = sum(int(part[:, 4:-4].mean() > 127) << bit for bit, part in enumerate(parts))
    return int(np.bitwise_xor.reduce([gray >> shift for shift in range(BITS)]))


def make_film(
    path: Path,
    lengths: list[int],
    *,
    size: tuple[int, int] = (128, 64),
    fps: int = 24,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    bars: tuple[int, int] = (0, 0),
    ticks: list[int] | None = None,
    aspect: Fraction | None = None,
    turned: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a film of hard cuts; `size` and `bars` are (across, down), `ticks` are PTS in milliseconds."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if turned:
            stream.set_display_rotation(turned)
        if codec == "libx264":
            stream.options = {"crf": "12", "g": "12"}
        else:
            stream.bit_rate = 4_000_000
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        shots = [shot for shot, length in enumerate(lengths) for _ in range(length)]
        for number, shot in enumerate(shots):
            drawn = np.full((size[1], size[0], 3), 0, np.uint8)
            inner = picture(number, shot, size[0] - 2 * bars[0], size[1] - 2 * bars[1])
            drawn[bars[1] : size[1] - bars[1], bars[0] : size[0] - bars[0]] = inner
            frame = av.VideoFrame.from_ndarray(drawn, format="rgb24")
            frame.pts, frame.time_base = (ticks[number], Fraction(1, 1000)) if ticks else (number, Fraction(1, fps))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_truth(film: Path, lengths: list[int]) -> None:
    captions = ["wide shot. <ada> left: red round.", "close shot. <bo> right: blue square.", "medium shot. <ada> runs."]
    captions = [captions[i % len(captions)] for i in range(len(lengths))]
    ends = np.cumsum(lengths).tolist()
    cast = [{"tag": "<ada>", "description": "red round"}, {"tag": "<bo>", "description": "blue square"}]
    story = {"title": "two friends", "cast": cast, "shots": [{"caption": c} for c in captions]}
    keys = ("start_frame", "end_frame", "caption")
    shots = [dict(zip(keys, row, strict=True), extra=1) for row in zip([0, *ends[:-1]], ends, captions, strict=True)]
    film.with_suffix(".json").write_text(json.dumps({"story": story, "shots": shots, "seed": 1}))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def cuts_of(film: Film, picture: Box, detector: str) -> list[int]:
    return [shot.start for shot in cut_film(film, picture, detector, Timeline())][1:]


def test_shots_tile_the_film_and_each_keyframe_is_its_shots_middle_frame(tmp_path):
    lengths = [17, 11, 30, 8, 1 + 20]
    film = make_film(tmp_path / "a.mp4", lengths)
    report = curate_film(film, tmp_path / "out", annotator=NoAnnotator(), height=64)
    rows = read_film(tmp_path / "out" / "a.parquet").shots
    starts = np.cumsum([0, *lengths]).tolist()
    assert report == FilmReport(film, "ok", 5, 5)
    assert [(r.start_frame, r.end_frame) for r in rows] == list(pairwise(starts))
    assert all(a.end_s == b.start_s for a, b in pairwise(rows))
    assert rows[-1].end_s == pytest.approx(starts[-1] / 24, abs=1e-4)
    for row in rows:
        middle = number_in(row.image)
        assert abs(middle - (row.start_frame + row.end_frame - 1) / 2) <= 0.5
        assert row.keyframe_s == pytest.approx(middle / 24, abs=1e-4)
        ticks = row.start_s / Fraction(row.time_base)
        assert ticks == pytest.approx(round(ticks), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.mpg", "mpeg2video"), ("a.avi", "mpeg4")]
)
def test_the_middle_frame_is_exact_in_every_container(tmp_path, name, codec):
    film = make_film(tmp_path / name, [20, 21], codec=codec)
    curate_film(film, tmp_path / "out", annotator=NoAnnotator(), height=64)
    rows = read_film(tmp_path / "out" / "a.parquet").shots
    assert [number_in(r.image) for r in rows] in ([10, 30], [9, 30])
    assert [r.start_frame for r in rows] == [0, 20]


def test_cuts_are_those_of_pyscenedetect(tmp_path):
    film = make_film(tmp_path / "a.mp4", [17, 14, 25, 9])
    manager = SceneManager()
    manager.add_detector(ContentDetector(min_scene_len=SHORTEST_SHOT))
    manager.detect_scenes(open_video(str(film), backend="pyav", suppress_output=True))
    theirs = [start.pts for start, _ in manager.get_scene_list(start_in_scene=True)]
    facts = probe(film)
    assert [shot.start_pts for shot in cut_film(facts, Box(0, 0, 128, 64), "content", Timeline())] == theirs
    for detector in ("content", "adaptive", DETECTOR):
        assert cuts_of(facts, Box(0, 0, 128, 64), detector) == [17, 31, 56]


def test_a_film_without_a_cut_is_one_shot_and_so_is_a_single_frame(tmp_path):
    for name, length in (("long", 30), ("one", 1)):
        film = make_film(tmp_path / f"{name}.mp4", [length])
        assert curate_film(film, tmp_path / "out", annotator=NoAnnotator(), height=64).shots == 1
        (row,) = read_film(tmp_path / "out" / f"{name}.parquet").shots
        assert (row.start_frame, row.end_frame) == (0, length)
        assert row.end_s - row.start_s == pytest.approx(length / 24, abs=1e-3)


def test_variable_frame_rate_is_timed_by_pts(tmp_path):
    # 20 frames 40 ms apart, then a shot whose last frame stands for a second: its middle is that of time
    ticks = [40 * i for i in range(20)] + [800 + 20 * i for i in range(20)] + [1200, 2200, 2240]
    film = make_film(tmp_path / "a.mkv", [20, 23], ticks=ticks)
    curate_film(film, tmp_path / "out", annotator=NoAnnotator(), height=64)
    first, second = read_film(tmp_path / "out" / "a.parquet").shots
    assert (first.start_s, first.end_s, second.start_s) == (0.0, 0.8, 0.8)
    assert number_in(second.image) == 40  # shown from 1.2 s to 2.2 s
    assert second.keyframe_s == 1.2


@pytest.mark.parametrize("bars", [(0, 16), (24, 0), (0, 0), (10, 10)])
def test_borders_are_found_to_the_pixel_or_next_to_it(tmp_path, bars):
    film = make_film(tmp_path / "a.mp4", [6, 6, 6], size=(160, 96), bars=bars)
    found = find_borders(probe(film))
    wanted = (bars[0], bars[1], 160 - bars[0], 96 - bars[1])
    assert np.abs(np.subtract((found.left, found.top, found.right, found.bottom), wanted)).max() <= 1


def test_a_dark_film_keeps_its_whole_frame(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 4, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert find_borders(probe(path)) == Box(0, 0, 64, 32)
    report = curate_film(path, tmp_path / "out", annotator=NoAnnotator(), height=32)
    (row,) = read_film(tmp_path / "out" / "a.parquet").shots
    assert (report.kept, row.kept, row.reason) == (0, False, "blank frame")


def test_a_keyframe_is_the_area_mean_of_the_centre(tmp_path):
    film = make_film(tmp_path / "a.mp4", [2], size=(160, 96), bars=(0, 4), pixels="yuv444p")
    frame = next(read_frames(probe(film))).image
    crop = frame.to_ndarray(format="rgb24")[4 + 4 : 92 - 4].astype(np.float64)  # 160 x 88 without bars: 2:1 is 160 x 80
    mean = crop.reshape(40, 2, 80, 2, 3).mean(axis=(1, 3))
    ours = keyframe_image(frame, probe(film), Box(0, 4, 160, 92), 40)
    assert ours.shape == (40, 80, 3)
    assert np.abs(ours - mean).max() <= 1.0  # rounding to whole grey levels, in each direction once


def test_sample_aspect_and_rotation_come_before_the_crop(tmp_path):
    plain = make_film(tmp_path / "plain.mp4", [3], size=(128, 64))
    wide = make_film(tmp_path / "wide.mp4", [3], size=(64, 64), aspect=Fraction(2))  # each stored pixel two wide
    expected = picture(0, 0, 128, 64).astype(float)
    for film in (plain, wide):
        facts = probe(film)
        image = keyframe_image(next(read_frames(facts)).image, facts, Box(0, 0, facts.width, 64), 64)
        assert np.abs(image - expected).mean() < 8  # a compressed 64-pixel copy is soft
    upside = probe(make_film(tmp_path / "upside.mp4", [3], size=(128, 64), turned=180))
    image = keyframe_image(next(read_frames(upside)).image, upside, Box(0, 0, 128, 64), 64)
    assert np.abs(image[::-1, ::-1] - expected).mean() < 8
    portrait = probe(make_film(tmp_path / "portrait.mp4", [3], size=(128, 64), turned=90))
    image = keyframe_image(next(read_frames(portrait)).image, portrait, Box(0, 0, 128, 64), 64)
    turned = np.rot90(expected)  # 128 rows, 64 columns: the middle 32 rows, twice as large
    assert np.abs(image[::2, ::2] - turned[48:80]).mean() < 12


def test_odd_sizes_and_pixel_formats_work(tmp_path):
    film = make_film(tmp_path / "a.mkv", [12, 12], size=(131, 67), codec="ffv1", pixels="yuv444p")
    deep = make_film(tmp_path / "deep.mkv", [12, 12], codec="ffv1", pixels="yuv422p10le")
    report = curate([film, deep], tmp_path / "out", annotator=NoAnnotator(), height=32)
    assert [f.shots for f in report.films] == [2, 2]
    for name in ("a", "deep"):
        for row in read_film(tmp_path / "out" / f"{name}.parquet").shots:
            assert Image.open(BytesIO(row.image)).size == (64, 32)
    assert number_in(read_film(tmp_path / "out" / "deep.parquet").shots[1].image) in (17, 18)


def test_bad_films_cost_only_themselves(tmp_path):
    good = make_film(tmp_path / "good.mp4", [12, 12])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(b"not a film at all" * 99)
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size * 2 // 3])  # the index is at the end
    (tmp_path / "folder.mp4").mkdir()
    make_sound(tmp_path / "sound.m4a")
    names = ["missing.mp4", "empty.mp4", "noise.mp4", "cut.mp4", "folder.mp4", "sound.m4a", "good.mp4"]
    report = curate([tmp_path / n for n in names], tmp_path / "out", annotator=NoAnnotator(), height=64)
    says = ["no such film", "not readable", "not readable", "not readable", "no such film", "no moving picture"]
    assert [f.film.name for f in report.failed] == names[:-1]
    for one, words in zip(report.failed, says, strict=True):
        assert words in one.reason and "\n" not in one.reason and str(one.film) in one.reason
    assert sorted(p.name for p in (tmp_path / "out").glob("*")) == sorted(
        ["README.md", "good.parquet", *(f"{Path(n).stem}.done.json" for n in names)]
    )
    again = curate([tmp_path / n for n in names], tmp_path / "out", annotator=NoAnnotator(), height=64)
    assert [f.skipped for f in again.films] == [False] * 6 + [True]
    shutil.copy(good, tmp_path / "missing.mp4")  # mended: the same command picks it up
    assert (
        curate([tmp_path / "missing.mp4"], tmp_path / "out", annotator=NoAnnotator(), height=64).films[0].status == "ok"
    )


def test_a_film_that_ends_early_is_partial_and_says_so(tmp_path):
    whole = make_film(tmp_path / "whole.mp4", [24, 24, 24], options={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    report = curate_film(cut, tmp_path / "out", annotator=NoAnnotator(), height=64)
    done = json.loads((tmp_path / "out" / "cut.done.json").read_text())
    assert report.status == done["status"] == "partial" and "s of 3.00 s" in report.reason
    assert done["last_pts_s"] < 2.4 and done["duration_s"] == pytest.approx(3.0)
    assert number_in(read_film(tmp_path / "out" / "cut.parquet").shots[0].image) in (11, 12)


def test_flipped_bits_never_reach_a_keyframe(tmp_path):
    lengths = [24] * 5
    clean = make_film(tmp_path / "clean.ts", lengths)
    data = bytearray(clean.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(len(data) // 5, len(data) * 4 // 5, 40):
        data[at] ^= 1 << int(rng.integers(8))
    (tmp_path / "hurt.ts").write_bytes(data)
    report = curate_film(tmp_path / "hurt.ts", tmp_path / "out", annotator=NoAnnotator(), height=64)
    truth = {frame.pts: frame.image.to_ndarray(format="rgb24") for frame in read_frames(probe(clean))}
    rows = [r for r in read_film(tmp_path / "out" / "hurt.parquet").shots if r.kept]
    assert report.status == "partial" and "damaged" in report.reason and rows
    for row in rows:
        pts = round(row.keyframe_s / Fraction(row.time_base))
        seen = np.asarray(Image.open(BytesIO(row.image))).astype(float)
        assert np.abs(seen - truth[pts]).mean() < 4  # JPEG; a broken or a neighbouring frame is far above


def run_until_killed(films: list[Path], out: Path, calls: int) -> None:
    """Curate in another process that kills itself, as `kill -9` does, after so many calls of `on_progress`."""
    code = f"""
import os, signal
from pathlib import Path
from cinema.curation import GroundTruthAnnotator, curate
calls = 0
def tell(done, total, message):
    global calls
    calls += 1
    if calls == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
films = [Path(p) for p in {[str(f) for f in films]!r}]
curate(films, Path({str(out)!r}), annotator=GroundTruthAnnotator(), height=64, on_progress=tell)
"""
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL


def test_after_kill_9_the_same_command_ends_with_the_same_bytes(tmp_path):
    films = [make_film(tmp_path / f"{n}.mp4", [12, 13 + i, 14]) for i, n in enumerate(["a", "b [1]"])]
    for i, film in enumerate(films):
        write_truth(film, [12, 13 + i, 14])
    calls: list[tuple[int, int, str]] = []
    whole = curate(
        films, tmp_path / "whole", annotator=GroundTruthAnnotator(), height=64, on_progress=lambda *c: calls.append(c)
    )
    done = [c[0] for c in calls]
    assert done == sorted(done) and calls[-1][:2] == (79, 79) and {c[1] for c in calls} == {79}
    run_until_killed(films, tmp_path / "out", 3 * len(calls) // 4)
    before = (tmp_path / "out" / "a.parquet").stat().st_mtime_ns
    (tmp_path / "out" / ".b [1].part7.parquet").write_bytes(b"half")  # what a kill while writing leaves
    report = curate(films, tmp_path / "out", annotator=GroundTruthAnnotator(), height=64)
    assert [f.skipped for f in report.films] == [True, False]
    assert (tmp_path / "out" / "a.parquet").stat().st_mtime_ns == before
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert [(f.shots, f.kept, f.status) for f in report.films] == [(f.shots, f.kept, f.status) for f in whole.films]


def test_a_changed_film_is_curated_again(tmp_path):
    film = make_film(tmp_path / "a.mp4", [12, 12])
    assert curate_film(film, tmp_path / "out", annotator=NoAnnotator(), height=64).shots == 2
    make_film(film, [12, 12, 12])
    report = curate_film(film, tmp_path / "out", annotator=NoAnnotator(), height=64)
    assert (report.shots, report.skipped) == (3, False)


def test_a_changed_ground_truth_is_read_again_and_concerns_nobody_else(tmp_path):
    film = make_film(tmp_path / "a.mp4", [12, 12])
    for annotator, again in ((GroundTruthAnnotator(), True), (NoAnnotator(), False)):
        write_truth(film, [12, 12])
        out = tmp_path / annotator.identity["kind"]
        assert not curate([film], out, annotator=annotator, height=64).films[0].skipped
        assert curate([film], out, annotator=annotator, height=64).films[0].skipped
        truth = json.loads(film.with_suffix(".json").read_text())
        truth["shots"][1]["caption"] = "close shot. <ada> right: red round."
        film.with_suffix(".json").write_text(json.dumps(truth))
        assert curate([film], out, annotator=annotator, height=64).films[0].skipped is not again
        assert not again or read_film(out / "a.parquet").shots[1].tags == ["<ada>"]


def test_wrong_commands_are_refused_in_one_sentence(tmp_path):
    film = make_film(tmp_path / "a.mp4", [12])
    (tmp_path / "other").mkdir()
    twin = Path(shutil.copy(film, tmp_path / "other" / "a.mp4"))
    out = tmp_path / "out"
    curate([film], out, annotator=NoAnnotator(), height=64)
    for films, where, settings, words in [
        ([], out, {}, "no film"),
        ([film, twin], out, {"height": 64}, "rename one"),
        ([film], out, {"height": 32}, "other settings"),
        ([film], out, {"detector": "magic"}, "no detector 'magic'"),
    ]:
        with pytest.raises(UserError, match=words):
            curate(films, where, annotator=NoAnnotator(), **settings)
    with pytest.raises(StoppedError, match="cannot write"):
        curate([film], film / "inside", annotator=NoAnnotator())


def test_ground_truth_gives_captions_by_greatest_overlap_and_the_film_becomes_a_story(tmp_path):
    film = make_film(tmp_path / "a.mp4", [12, 12, 20])
    write_truth(film, [13, 11, 20])  # the truth says one frame later than the detector will
    curate([film], tmp_path / "out", annotator=GroundTruthAnnotator(), height=64)
    rows = read_film(tmp_path / "out" / "a.parquet").shots
    assert [r.tags for r in rows] == [["<ada>"], ["<bo>"], ["<ada>"]]
    story = story_of(tmp_path / "out" / "a.parquet")
    assert [s.caption for s in story.shots] == [r.caption for r in rows]
    assert story.cast == [
        Character(tag="<ada>", description="red round"),
        Character(tag="<bo>", description="blue square"),
    ]
    source = story.shots[1].source
    assert source and (source.film, source.start_frame, source.end_frame) == ("a.mp4", 12, 24)
    assert story.shots[2].duration == pytest.approx(20 / 24, abs=1e-3)


def test_a_missed_cut_never_gives_a_picture_the_caption_of_another(tmp_path):
    film = make_film(tmp_path / "a.mp4", [24, 12])
    write_truth(film, [8, 7, 9, 5])  # one detected shot is three true ones; the last is half of one, and half nothing
    curate([film], tmp_path / "out", annotator=GroundTruthAnnotator(), height=64)
    first, second = read_film(tmp_path / "out" / "a.parquet").shots
    assert (first.kept, first.caption) == (False, "") and "a cut was missed" in first.reason
    assert (second.kept, second.reason) == (False, "a cut was missed: its keyframe is of another true shot")
    write_truth(film, [24])
    curate([film], tmp_path / "other", annotator=GroundTruthAnnotator(), height=64)
    first, second = read_film(tmp_path / "other" / "a.parquet").shots
    assert first.kept and (second.kept, second.reason) == (False, "the ground truth has no shot here")


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "not a ground truth that can be read (No such file"), ("{", "not a ground truth"), ("[]", "not a")],
)
def test_a_film_without_its_ground_truth_fails_alone(tmp_path, text, words):
    film, good = make_film(tmp_path / "a.mp4", [12]), make_film(tmp_path / "b.mp4", [12])
    write_truth(good, [12])
    if text is not None:
        film.with_suffix(".json").write_text(text)
    report = curate([film, good], tmp_path / "out", annotator=GroundTruthAnnotator(), height=64)
    assert [f.status for f in report.films] == ["failed", "ok"] and words in report.films[0].reason


def test_the_store_keeps_every_field_and_names_a_wrong_file(tmp_path):
    columns = "shot start_s end_s start_frame end_frame time_base keyframe_s crop_left crop_top crop_right crop_bottom"
    columns += " image caption tags kept reason transition keyframe_frame scores"
    place = {"start_frame": 0, "end_frame": 9, "time_base": "1/9", "crop_left": 1, "crop_top": 2}
    place |= {"crop_right": 3, "crop_bottom": 4}
    rows = [CuratedShot(i, i / 3, (i + 1) / 3, keyframe_s=None, image=None, kept=False, **place) for i in range(40)]
    rows.append(CuratedShot(40, 9.0, 10.0, keyframe_s=9.5, image=b"\xff", caption="<cy> é", tags=["<cy>"], **place))
    film = CuratedFilm("ä b.mp4", [Character(tag="<ada>", description="ü")], rows)
    write_film(tmp_path / "x.parquet", film.film, film.cast, film.shots)
    assert read_film(tmp_path / "x.parquet") == film
    assert read_film(tmp_path / "x.parquet", images=False).shots[40] == replace(rows[40], image=None)
    assert [row.image for row in read_rows(tmp_path / "x.parquet")] == [None] * 40 + [b"\xff"]
    meta = pq.ParquetFile(tmp_path / "x.parquet").metadata
    assert meta.schema.to_arrow_schema().names == columns.split()
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [32, 9]
    assert [c.tag for c in story_of(tmp_path / "x.parquet").cast] == ["<cy>", "<ada>"]
    write_film(tmp_path / "y.parquet", "y", [], rows[:1])
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    for name, words in (("y", "no shot is kept"), ("z", "not a curated film"), ("none", "no such file")):
        with pytest.raises(UserError, match=words):
            story_of(tmp_path / f"{name}.parquet")


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips lie beside the project only where they were put")
@pytest.mark.parametrize(
    ("name", "found", "top_bottom"),
    [
        ("bbb_480p_30s", {"content": 3, "planes": 3}, (0, 480)),  # of 3
        ("sintel_film_letterbox_848x480_26s", {"content": 6, "planes": 6}, (58, 421)),  # of 6
        # Of 9: in black and white two of the content detector's three terms are dead.
        ("nosferatu_1922_640x480_48s", {"content": 3, "planes": 9}, (0, 480)),
    ],
)
def test_hard_cuts_of_real_films(name, found, top_bottom):
    facts = probe(CLIPS / f"{name}.mp4")
    borders = find_borders(facts)
    assert np.abs(np.subtract((borders.top, borders.bottom), top_bottom)).max() <= 1
    listed = list(csv.DictReader((CLIPS / f"{name}.cuts.csv").read_text().splitlines()))
    true = [int(row["frame"]) for row in listed if row["score"] == "1"]
    events = [(int(row["start"]) - 1, int(row["end"]) + 1) for row in listed]
    for detector, least in found.items():
        cuts = cuts_of(facts, borders, detector)
        assert sum(any(abs(t - c) <= 1 for c in cuts) for t in true) >= least
        assert all(any(a <= cut <= b for a, b in events) for cut in cuts)  # nothing found where nothing happens
