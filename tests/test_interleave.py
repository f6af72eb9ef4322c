"""Interleaved data: windows that differ, in the same order whoever reads them, out of toy and of curated films."""

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinema import curation
from cinema.errors import UserError
from cinema.interleave import CuratedFilms, ToyFilms, Windows, count_windows, strided
from cinema.toyworld.film import write_film
from cinema.toyworld.world import sample_movie


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_the_number_of_windows_is_what_listing_them_gives(shots: int, pairs: int, stride: int) -> None:
    steps = [
        w for w in itertools.combinations(range(shots), pairs) if all(b - a <= stride for a, b in itertools.pairwise(w))
    ]
    assert count_windows(shots, pairs, stride) == len(steps)


def test_every_window_is_as_likely_as_any_other() -> None:
    rng, total = random.Random(0), count_windows(8, 4, 3)
    drawn = [tuple(strided(rng, 8, 4, 3)) for _ in range(200 * total)]
    counts = {window: drawn.count(window) for window in {*drawn}}
    assert len(counts) == total and min(counts.values()) > 130 and max(counts.values()) < 280
    assert all(1 <= b - a <= 3 for w in counts for a, b in itertools.pairwise(w))
    with pytest.raises(UserError, match="12 pairs, but the film has 8 shots"):
        strided(rng, 8, 12)


def test_windows_are_the_same_in_any_order_and_change_from_epoch_to_epoch() -> None:
    lengths = [24, 5, 30, 24]
    windows = Windows(lengths, 12, seed=3)
    forward = [windows[i] for i in range(30)]
    backward = [Windows(lengths, 12, seed=3)[i] for i in reversed(range(30))][::-1]
    assert forward == backward != [Windows(lengths, 12, seed=4)[i] for i in range(30)]
    assert all({w.film for w in forward[e : e + 3]} == {0, 2, 3} for e in range(0, 30, 3)), "film 1 is too short"
    for film in (0, 2, 3):
        own = [w for w in forward if w.film == film]
        assert all(a.shared(b) <= 0.75 for a, b in itertools.pairwise(own))
    with pytest.raises(UserError, match="31 pairs, but the longest film has 30 shots"):
        Windows(lengths, 31)


def test_a_film_as_short_as_the_window_gives_it_again_and_again() -> None:
    windows = Windows([4], 4)
    assert windows[0].shots == windows[7].shots == (0, 1, 2, 3)


def test_toy_films_tell_their_shots_as_a_film_of_their_own() -> None:
    films = ToyFilms(0, 2, 6)
    told = films.captions(1, [3, 5])
    movie = films.movie(1)
    first = movie.shots[3].actors[0].tag
    assert f"{first} " in told[0] and str(movie.cast[first]) in told[0]
    assert not any(":" in line for line in films.captions(1, [3, 5], described=False))
    assert {*told, *films.captions(1, range(6)), *films.captions(1, [2], described=False)} <= {*films.variants(1)}
    assert films.looks(1)[first] == str(movie.cast[first])
    assert [f.size for f in films.frames(0, 64)] == [(128, 64)] * 6
    assert films.name != ToyFilms(1, 2, 6).name and films.lengths == [6, 6]


def test_curated_films_are_what_was_kept_and_told(tmp_path: Path) -> None:
    for seed in range(2):
        write_film(sample_movie(seed, 5), tmp_path / f"film{seed}.mp4", height=128)
    films = curation.find_films([str(tmp_path)], str(tmp_path / "out"))
    curation.curate(films, str(tmp_path / "out"), annotator=curation.GroundTruthAnnotator(), height=128)
    curated = CuratedFilms(tmp_path / "out")
    assert len(curated.lengths) == 2 and all(0 < n <= 5 for n in curated.lengths)
    lines = curated.captions(0, [0, 1])
    assert lines == curated.variants(0)[:2] and "shot," in lines[0] and curated.looks(0) == {}
    assert [f.size for f in curated.frames(0, 64)] == [(128, 64)] * curated.lengths[0]
    name = curated.name
    (tmp_path / "out" / "film1.done.json").unlink()
    assert len(CuratedFilms(tmp_path / "out").lengths) == 1 and CuratedFilms(tmp_path / "out").name != name
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no curated film with captions is there"):
        CuratedFilms(tmp_path / "empty")
