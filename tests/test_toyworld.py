import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_media import read_frames

from cinema.curation import GroundTruthAnnotator, curate, read_film
from cinema.errors import UserError
from cinema.story import Story
from cinema.toyworld.draw import render
from cinema.toyworld.film import BLACK, _pieces, draw_clip, write_film, write_films
from cinema.toyworld.world import (
    ACTIONS,
    COLOURS,
    HATS,
    PLACES,
    POSITIONS,
    SHAPES,
    SIZES,
    Actor,
    Movie,
    Setup,
    all_looks,
    parse_caption,
    sample_movie,
)


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference, in levels of 255."""
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


# --- facts ------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_movie() -> None:
    assert sample_movie(7, 5) == sample_movie(7, 5) != sample_movie(8, 5)
    movie = sample_movie(7, 5)
    assert render(movie, movie.shots[0], 64).tobytes() == render(sample_movie(7, 5), movie.shots[0], 64).tobytes()


def test_captions_round_trip_and_describe_each_look_once() -> None:
    for seed in range(30):
        movie = sample_movie(seed, 8, looks="all")
        parsed = [parse_caption(line) for line in movie.captions()]
        assert [setup for setup, _ in parsed] == movie.shots
        told = [(tag, look) for _, looks in parsed for tag, look in looks.items()]
        shown = {a.tag for setup in movie.shots for a in setup.actors}
        assert dict(told) == {tag: movie.cast[tag] for tag in shown} and len(told) == len(shown)
        assert {t: i for i, (_, looks) in enumerate(parsed) for t in looks} == movie.story().first_appearances()


@pytest.mark.parametrize(
    "line", ["", "A dog runs.", "wide shot, moon. static.", "wide shot, city. <ada> left. static."]
)
def test_other_captions_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        parse_caption(line)


def test_held_out_looks_are_never_trained_on() -> None:
    looks = all_looks()
    held_out = {x for x in looks if x.held_out}
    assert len(looks) == len(set(looks)) == len(COLOURS) * len(SHAPES) * len(HATS) and 0.05 < len(held_out) / 300 < 0.15
    trained = {x for i in range(150) for x in sample_movie(f"train/{i}", 1).cast.values()}
    unseen = {x for i in range(30) for x in sample_movie(f"train/{i}", 1, looks="unseen").cast.values()}
    assert not trained & held_out and unseen <= held_out and len(trained) > 150 and len(unseen) > 15


def test_a_movie_that_returns_ends_on_someone_absent() -> None:
    movie = sample_movie("back", 6, returns=True)
    (back,) = movie.shots[-1].actors
    assert back.tag in {a.tag for a in movie.shots[0].actors}
    assert not any(back.tag == a.tag for setup in movie.shots[1:-1] for a in setup.actors)


# --- pictures ---------------------------------------------------------------------------------------------------


def test_any_resolution_is_the_same_picture() -> None:
    movie = sample_movie("resolution", 3)
    for setup in movie.shots:
        small, large = render(movie, setup, 64, 0.4), render(movie, setup, 256, 0.4)
        assert (small.size, large.size) == ((128, 64), (512, 256))
        assert difference(small, large.reduce(4)) < 3  # of 255: edges fall differently on the grid


def test_a_keyframe_gives_no_action_away_and_every_action_moves() -> None:
    movie = sample_movie("actions", 1)
    setup = movie.shots[0]

    def at(action: str, time: float) -> Image.Image:
        return render(movie, replace(setup, actors=tuple(replace(a, action=action) for a in setup.actors)), 64, time)

    start, later = [at(a, 0.0) for a in ACTIONS], [at(a, 0.2) for a in ACTIONS]
    assert all(difference(start[0], other) == 0 for other in start)
    assert all(difference(a, b) > 0.05 for i, a in enumerate(later) for b in later[:i])


def test_sizes_positions_and_places_look_different() -> None:
    movie = next(m for i in range(999) if len((m := sample_movie(i, 1)).sets) > 2)
    tag = next(iter(movie.cast))
    pictures = [
        render(movie, Setup(place, size, "static", (Actor(tag, position, "standing"),)), 32)
        for place in movie.sets
        for size in SIZES
        for position in POSITIONS
    ]
    assert len({p.tobytes() for p in pictures}) == len(pictures) == 27 and len(PLACES) == 6


# --- films ------------------------------------------------------------------------------------------------------


def truth_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def test_the_ground_truth_is_exact(tmp_path: Path) -> None:
    movie = sample_movie("plain", 5)
    write_film(movie, tmp_path / "a.mp4", height=96, frames=9, crf=10)
    truth, frames = truth_of(tmp_path / "a.mp4"), read_frames(tmp_path / "a.mp4")
    assert Story.model_validate(truth["story"]) == movie.story()
    assert (truth["fps"], truth["height"], truth["width"], truth["bars"]) == (8, 96, 192, [0, 0])
    assert truth["cuts"] == [9, 18, 27, 36] and [s["start_frame"] for s in truth["shots"]] == [0, *truth["cuts"]]
    drawn = [image for setup in movie.shots for image in draw_clip(movie, setup, 96, 9)]
    for seen, true in zip(frames, drawn, strict=True):
        assert difference(seen, true) < 4  # of 255: 4:2:0 and crf 10
    for shot, setup, line in zip(truth["shots"], movie.shots, movie.captions(), strict=True):
        assert (shot["caption"], shot["place"], shot["size"], shot["camera"]) == (
            line,
            setup.place,
            setup.size,
            setup.camera,
        )
        assert shot["looks"] == {a.tag: vars(movie.cast[a.tag]) for a in setup.actors}


def kinds(movie: Movie) -> set[str]:
    """How the shots of a film with transitions are joined."""
    return {start for _, start, _ in _pieces(movie, height=2, frames=9, transitions=True, titles=False)}


def test_transitions_bars_cards_and_black_are_where_the_truth_says(tmp_path: Path) -> None:
    movie = next(m for i in range(99) if kinds(m := sample_movie(f"hard/{i}", 5)) == {"cut", "dissolve", "fade"})
    write_film(movie, tmp_path / "a.mp4", height=64, frames=17, transitions=True, letterbox=12, titles=True, crf=10)
    truth, frames = truth_of(tmp_path / "a.mp4"), read_frames(tmp_path / "a.mp4")
    assert (truth["height"], truth["width"], truth["bars"]) == (88, 128, [12, 12])
    pictures = np.stack([np.asarray(f) for f in frames])
    assert pictures[:, :11].max() < 24 and pictures[:, -11:].max() < 24  # a pixel beside the edge belongs to the codec
    shots = truth["shots"]
    assert {s["transition"] for s in shots} == {"cut", "dissolve", "fade"}
    for before, after in pairwise(shots):
        gap = pictures[before["end_frame"] : after["start_frame"]]
        assert len(gap) == (BLACK if after["transition"] == "fade" else 0) and (not len(gap) or gap.max() < 24)
    for shot, setup in zip(shots, movie.shots, strict=True):
        middle = (shot["start_frame"] + shot["end_frame"]) // 2
        picture = frames[middle].crop((0, 12, 128, 76))
        errors = [min(difference(picture, x) for x in draw_clip(movie, s, 64, 17)) for s in movie.shots]
        assert min(errors) < 5 and errors.index(min(errors)) == movie.shots.index(setup)
    spans = [0, *truth["cuts"], len(frames)]
    assert spans == sorted(set(spans)) and {s["start_frame"] for s in shots} <= set(spans)
    assert pictures[0].max() < 24 and pictures[spans[1] + 1].max() > 150 and pictures[-1].max() < 24


def test_nothing_half_written_and_no_truth_without_its_film(tmp_path: Path) -> None:
    path, movie = tmp_path / "a.mp4", sample_movie("stop", 3)
    write_film(movie, path, height=32, frames=2)

    def stop(done: int, total: int, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_film(movie, path, height=32, frames=2, on_progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]  # the old film; its truth is made again with the next


@pytest.mark.parametrize("wrong", [{"height": 33}, {"height": 0}, {"frames": 0}])
def test_settings_that_make_no_film(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match=r"a\.mp4"):
        write_film(sample_movie(0, 2), tmp_path / "a.mp4", **wrong)
    assert not list(tmp_path.iterdir())


def test_films_go_on_where_they_stopped(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    films = write_films(
        3, 1, tmp_path, lambda done, total, what: told.append((done, total)), shots=2, height=32, frames=2
    )
    first = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(tmp_path.iterdir())}
    assert len(first) == 6 and told == [(1, 3), (2, 3), (3, 3)]
    films[1].with_suffix(".json").unlink()  # as if killed between film and truth
    (tmp_path / f".{films[1].stem}.part99.mp4").write_bytes(b"half")
    films[2].unlink()
    write_films(3, 1, tmp_path, shots=2, height=32, frames=2)
    again = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(tmp_path.iterdir())}
    assert {n: x[0] for n, x in again.items()} == {n: x[0] for n, x in first.items()}
    assert again[films[0].name] == first[films[0].name] and again[films[1].name] != first[films[1].name]
    write_films(1, 1, tmp_path, shots=2, height=48, frames=2)  # other settings: made anew
    assert truth_of(films[0])["height"] == 48


def test_a_toy_film_is_curated_with_its_true_captions(tmp_path: Path) -> None:
    (film,) = write_films(1, 5, tmp_path, shots=6, letterbox=8)
    report = curate([film], tmp_path / "out", annotator=GroundTruthAnnotator(), height=64, detector="adaptive")
    truth, curated = truth_of(film)["shots"], read_film(tmp_path / "out" / f"{film.stem}.parquet")
    assert not report.failed and [c.tag for c in curated.cast] == [c["tag"] for c in truth_of(film)["story"]["cast"]]
    kept = [(s.start_frame, s.end_frame, s.caption) for s in curated.shots if s.kept]
    assert len(kept) >= 4 and set(kept) <= {(s["start_frame"], s["end_frame"], s["caption"]) for s in truth}
    assert all((s.crop_top, s.crop_bottom) == (8, 136) for s in curated.shots)


def test_boxes_hold_their_characters(tmp_path: Path) -> None:
    movie = sample_movie("boxes", 4)
    write_film(movie, tmp_path / "a.mp4", frames=1, letterbox=8)
    for shot, setup in zip(truth_of(tmp_path / "a.mp4")["shots"], movie.shots, strict=True):
        for actor, facts in zip(setup.actors, shot["actors"], strict=True):
            alone = replace(setup, actors=(actor,))
            with_it, without = (np.asarray(render(movie, s), int) for s in (alone, replace(setup, actors=())))
            changed = np.abs(with_it - without).max(-1) > 70  # more than its shadow makes, on any ground
            left, top, right, bottom = facts["box"]
            inside = changed[top - 8 : bottom - 8, left:right]
            assert inside.sum() > 0.98 * changed.sum() > 0.2 * inside.size  # a pixel's edge may change a little more
            drawn = [np.flatnonzero(changed.any(k)) for k in (0, 1)]
            edges = np.array([drawn[0][0], drawn[1][0] + 8, drawn[0][-1] + 1, drawn[1][-1] + 9])
            assert np.abs(edges - facts["box"]).max() <= 3
            assert facts | {"box": 0} == vars(actor) | {"box": 0}
