from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cinema.media import FilmWriter, read_frames
from cinema.toyworld.draw import render
from cinema.toyworld.film import draw_clip
from cinema.toyworld.reader import THERE, cut_out, read_clip, read_keyframe
from cinema.toyworld.world import ACTIONS, CAMERAS, SIZES, Actor, Look, Movie, Setup, sample_movie


def plain(image: Image.Image) -> Image.Image:
    return image


def jpeg(image: Image.Image) -> Image.Image:
    image.save(data := BytesIO(), "JPEG", quality=50)
    return Image.open(data)


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 8, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).round().astype(np.uint8))


def shifted(image: Image.Image) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 2, 0, 1, -1))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize("change", [plain, jpeg, noisy, shifted, blurred])
def test_reads_its_own_renders(change: Callable[[Image.Image], Image.Image]) -> None:
    """The bar is 99 % over hundreds of frames; on these few, everything."""
    movies = [sample_movie(f"reader/{change.__name__}/{i}", 3, looks="all") for i in range(4)]
    for movie in movies:
        for setup in movie.shots:
            seen = read_keyframe(change(render(movie, setup)), setup)
            assert (seen.place, seen.size) == (setup.place, setup.size)
            assert {p: a.look for p, a in seen.found.items()} == {a.position: movie.cast[a.tag] for a in setup.actors}


def test_confidence_is_one_on_a_perfect_drawing_and_falls_with_blur() -> None:
    movie = sample_movie("confidence", 1)
    setup = movie.shots[0]
    pictures = [render(movie, setup).filter(ImageFilter.GaussianBlur(r)) for r in (0, 1, 2)]
    sure = [read_keyframe(p, setup).found[setup.actors[0].position].confidence for p in pictures]
    assert 0.9 < sure[0] <= 1.0 and sure[0] > sure[1] > sure[2] > THERE


@pytest.mark.parametrize("place", ["forest", "city", "snow", "night"])
def test_an_empty_set_and_mere_noise_show_nobody(place: str) -> None:
    movie = next(m for i in range(99) if place in (m := sample_movie(i, 1)).sets)
    claimed = Setup(place, "medium", "static", (Actor("<ada>", "left", "standing"),))
    seen = read_keyframe(render(movie, replace(claimed, actors=())), claimed)
    assert (seen.place, seen.size, seen.found, seen.actor("<ada>")) == (place, None, {}, None)
    static = np.random.default_rng(0).integers(0, 256, (128, 256, 3), np.uint8)
    assert not read_keyframe(Image.fromarray(static), claimed).found


def test_says_what_is_drawn_not_what_is_claimed() -> None:
    movie = sample_movie("claims", 1)
    tag, look = next(iter(movie.cast.items()))
    place = next(iter(movie.sets))
    drawn = Setup(place, "wide", "static", (Actor(tag, "left", "standing"),))
    claimed = replace(drawn, place="nowhere", size="close", actors=(Actor(tag, "right", "standing"),))
    seen = read_keyframe(render(movie, drawn), claimed)
    assert (seen.place, seen.size) == (place, "wide")
    assert seen.actor(tag) is None and seen.found["left"].look == look


def test_other_resolutions() -> None:
    movie = sample_movie("resolutions", 1)
    setup = movie.shots[0]
    for height in (96, 200, 256):
        seen = read_keyframe(render(movie, setup, height), setup)
        assert [seen.actor(a.tag).look for a in setup.actors] == [movie.cast[a.tag] for a in setup.actors]


def test_a_cut_out_on_its_set_is_the_rendering() -> None:
    movie = sample_movie("cut out", 1)
    tag, look = next(iter(movie.cast.items()))
    setup = Setup(next(iter(movie.sets)), "medium", "pan left", (Actor(tag, "center", "waving"),))
    colour, alpha = cut_out(look, setup, setup.actors[0], time=0.5)
    bare = np.asarray(render(movie, replace(setup, actors=()), time=0.5)) / 255
    error = np.abs(colour + (1 - alpha[..., None]) * bare - np.asarray(render(movie, setup, time=0.5)) / 255)
    assert error.max() < 3 / 255  # each sheet rounds to 8 bits, twice


def clips(movie: Movie, place: str) -> list[Setup]:
    """Every camera move, every shot size and every action."""
    tags, sizes = list(movie.cast), list(SIZES)
    shots = []
    for i, action in enumerate(ACTIONS):
        pair = (Actor(tags[0], "left", action), Actor(tags[1], "right", ACTIONS[(i + 2) % 5]))
        size = sizes[i % 3]
        shots.append(Setup(place, size, CAMERAS[i % 4], pair[: 1 if size == "close" else 2]))
    return shots


def test_reads_actions_and_moves_through_h264(tmp_path: Path) -> None:
    movie = sample_movie("clips", 1)
    shots = clips(movie, next(iter(movie.sets)))
    with FilmWriter(tmp_path / "a.mp4", 256, 128, 8, crf=23) as film:
        for setup in shots:
            for image in draw_clip(movie, setup):
                film.add(image)
    frames = read_frames(tmp_path / "a.mp4")
    for i, setup in enumerate(shots):
        clip = read_clip(frames[17 * i : 17 * i + 17], setup, movie.cast)
        assert clip.camera == setup.camera
        assert clip.actions == {a.tag: a.action for a in setup.actors}


def test_a_still_clip_stands_and_strangers_are_left_out() -> None:
    movie = sample_movie("still", 1)
    tag = next(iter(movie.cast))
    setup = Setup(
        next(iter(movie.sets)), "wide", "pan left", (Actor(tag, "left", "jumping"), Actor("<zoe>", "right", "waving"))
    )
    movie.cast["<zoe>"] = Look("pink", "pear", "bare")
    clip = read_clip([render(movie, setup)] * 9, setup, {tag: movie.cast[tag]})
    assert clip.camera == "static" and clip.actions == {tag: "standing"}


def test_too_few_frames() -> None:
    movie = sample_movie("few", 1)
    with pytest.raises(ValueError, match="at least 5"):
        read_clip([render(movie, movie.shots[0])] * 4, movie.shots[0], movie.cast)
