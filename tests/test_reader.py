import random
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_media import read_frames

from cinema.media import film_writer
from cinema.toyworld.draw import render, render_looks
from cinema.toyworld.film import draw_clip
from cinema.toyworld.reader import THERE, ReadClip, cut_out, read_clip, read_keyframe
from cinema.toyworld.world import (
    ACTIONS,
    CAMERAS,
    COLOURS,
    POSITIONS,
    SIZES,
    Actor,
    Look,
    Setup,
    sample_movie,
    sample_set,
)


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
    for i in range(2):
        movie = sample_movie(f"reader/{i}", 3, looks="all")
        for setup in movie.shots:
            seen = read_keyframe(change(render(movie, setup)), setup)
            assert (seen.place, seen.size) == (setup.place, setup.size)
            assert {p: a.look for p, a in seen.found.items()} == {a.position: movie.cast[a.tag] for a in setup.actors}


@pytest.mark.parametrize(("shape", "place"), [("triangle", "night"), ("tall", "city"), ("diamond", "forest")])
def test_what_stands_behind_is_no_hat(shape: str, place: str) -> None:
    """A purple wall or a dark sky behind a bare head is neither a purple cone nor a dark hat, and the reverse."""
    rng = random.Random(0)
    actors = tuple(Actor(f"<{p}>", p, "standing") for p in POSITIONS)
    setup = Setup(place, "wide", "static", actors)
    for hats in (("bare", "bare", "bare"), ("cone", "tophat", "bow")):
        cast = {a.tag: Look(rng.choice(list(COLOURS)), shape, hat) for a, hat in zip(actors, hats, strict=True)}
        seen = read_keyframe(render_looks(sample_set(place, rng), setup, cast), setup)
        assert {a.tag: found.look for a in actors if (found := seen.actor(a.tag))} == cast


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
    # Each sheet rounds to 8 bits twice; where an edge of the set meets an edge of the character, alpha does not add up.
    assert error.mean() < 0.1 / 255 and (error > 3 / 255).mean() < 1e-3


def test_reads_actions_and_moves_through_h264(tmp_path: Path) -> None:
    """Every action, every camera move, every shot size."""
    movie = sample_movie("clips", 1)
    place, tag, sizes = next(iter(movie.sets)), next(iter(movie.cast)), list(SIZES)
    shots = [
        Setup(place, sizes[i % 3], CAMERAS[i % 4], (Actor(tag, "left", action),)) for i, action in enumerate(ACTIONS)
    ]
    with film_writer(tmp_path / "a.mp4", 256, 128, 8, crf=23) as add:
        for setup in shots:
            for image in draw_clip(movie, setup):
                add(image)
    frames = read_frames(tmp_path / "a.mp4")
    for i, setup in enumerate(shots):
        clip = read_clip(frames[17 * i : 17 * i + 17], setup, movie.cast)
        assert clip == ReadClip(setup.camera, {tag: setup.actors[0].action})


def test_two_in_one_clip_are_read_apart() -> None:
    movie = sample_movie("two", 1)
    actors = tuple(
        Actor(t, p, a) for t, p, a in zip(movie.cast, ("left", "right"), ("waving", "jumping"), strict=False)
    )
    setup = Setup(next(iter(movie.sets)), "medium", "pan right", actors)
    clip = read_clip(draw_clip(movie, setup), setup, movie.cast)
    assert clip == ReadClip("pan right", {a.tag: a.action for a in actors})


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
