import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from cinema.config import TOY, Preset
from cinema.errors import UserError
from cinema.evaluation import (
    ATTRIBUTES,
    bootstrap,
    evaluate_stories,
    other_context,
    psnr,
    score_clip,
    score_keyframes,
)
from cinema.evaluation import stories as module
from cinema.keyframes import Keyframe, KeyframePlanner
from cinema.story import Story
from cinema.toyworld.draw import render, render_looks
from cinema.toyworld.film import draw_clip
from cinema.toyworld.world import Actor, Look, Setup, parse_caption, sample_movie, sample_set

MOVIE = sample_movie("evaluation", 4)
TRUE = [render(MOVIE, setup) for setup in MOVIE.shots]


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def test_the_truth_is_all_right_and_everything_is_judged() -> None:
    scores = score_keyframes(MOVIE.captions(), TRUE)
    appearances, first = sum(len(s.actors) for s in MOVIE.shots), len(MOVIE.story().first_appearances())
    assert all(scores.first) and all(scores.identity)
    assert {name: len(rows) for name, rows in scores.attributes.items()} == dict.fromkeys(ATTRIBUTES, first)
    assert len(scores.identity) == appearances - first > 0


def test_worse_pictures_score_worse() -> None:
    """True, then true pictures in another order, then another movie's, then grey."""
    stranger = sample_movie("stranger", 4)
    other = [render_looks(stranger.sets[s.place], s, stranger.cast) for s in stranger.shots]
    grey = [Image.new("RGB", (256, 128), (120, 120, 120))] * 4
    scores = [score_keyframes(MOVIE.captions(), images) for images in (TRUE, TRUE[2:] + TRUE[:2], other, grey)]
    first, identity = [share(s.first) for s in scores], [share(s.identity) for s in scores]
    assert first[0] == 1 > first[1] > 0 and first[0] > first[2] > first[3]
    assert identity[0] == 1 > identity[1] >= identity[2] >= identity[3] == 0


def test_forgotten_looks_cost_identity_alone() -> None:
    """The right sets, places and sizes, but whoever comes back has another's colour."""
    seen: set[str] = set()
    images = []
    for setup in MOVIE.shots:
        forgot = {
            t: replace(look, colour="white" if look.colour != "white" else "blue") for t, look in MOVIE.cast.items()
        }
        cast = {a.tag: forgot[a.tag] if a.tag in seen else MOVIE.cast[a.tag] for a in setup.actors}
        seen |= set(cast)
        images.append(render_looks(MOVIE.sets[setup.place], setup, cast))
    scores = score_keyframes(MOVIE.captions(), images)
    assert all(scores.first) and not any(scores.identity)


def test_each_attribute_is_its_own() -> None:
    look, design = Look("blue", "pear", "crown"), sample_set("beach", random.Random(0))
    setup = Setup("beach", "wide", "static", (Actor("<ada>", "left", "standing"),))
    line = "wide shot, beach. <ada> left, standing: blue pear, crown. static."
    right = actor = setup.actors[0]
    for name, changed in {
        "colour": (replace(look, colour="red"), setup),
        "shape": (replace(look, shape="square"), setup),
        "hat": (replace(look, hat="cone"), setup),
        "size": (look, replace(setup, size="medium")),
        "position": (look, replace(setup, actors=(replace(actor, position="right"),))),
    }.items():
        scores = score_keyframes([line], [render_looks(design, changed[1], {right.tag: changed[0]})])
        wrong = {key for key, rows in scores.attributes.items() if rows == [False]}
        assert wrong == ({"position", "colour", "shape", "hat"} if name == "position" else {name})
    elsewhere = sample_set("night", random.Random(0))
    scores = score_keyframes([line], [render_looks(elsewhere, setup, {"<ada>": look})])
    assert {key for key, rows in scores.attributes.items() if rows == [False]} == {"set"}


def test_an_image_per_caption_and_captions_in_the_language() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score_keyframes(MOVIE.captions(), TRUE[:-1])
    with pytest.raises(ValueError, match="caption"):
        score_keyframes(["A dog runs."], TRUE[:1])


def test_clip_scores() -> None:
    setup = Setup(next(iter(MOVIE.sets)), "medium", "push in", (Actor(next(iter(MOVIE.cast)), "left", "waving"),))
    line = f"medium shot, {setup.place}. {setup.actors[0].tag} left, waving. push in."
    frames = draw_clip(MOVIE, setup, frames=9)
    good = score_clip(frames, line, frames[0])
    assert (good.actions, good.camera, good.psnr) == ([True], True, 100.0)
    still = score_clip([frames[0]] * 9, line, frames[3])
    assert (still.actions, still.camera) == ([False], False) and still.psnr is not None and still.psnr < 40
    empty = score_clip(draw_clip(MOVIE, replace(setup, actors=()), frames=9), line)
    assert (empty.actions, empty.camera, empty.psnr) == ([False], True, None)


def test_psnr() -> None:
    grey = [Image.new("RGB", (8, 4), (v, v, v)) for v in (100, 110)]
    assert psnr(*grey) == pytest.approx(20 * np.log10(255 / 10))
    with pytest.raises(ValueError, match="compared"):
        psnr(grey[0], grey[0].resize((4, 4)))


def test_bootstrap_covers_the_share() -> None:
    rng = np.random.default_rng(0)
    rows = [[bool(x) for x in rng.random(5) < 0.7] for _ in range(60)]
    low, high = bootstrap(rows) or (1.0, 0.0)
    assert low < np.mean(rows) < high and high - low == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 300), rel=0.3)
    assert bootstrap([[True], [True, True]]) == [1, 1] and bootstrap([[], []]) is None
    clumped = [[row[0]] * 5 for row in rows]  # judgements that depend on each other say less
    wide_low, wide_high = bootstrap(clumped) or (0.0, 0.0)
    assert wide_high - wide_low > 1.5 * (high - low)


def test_the_other_context_ends_on_the_same_shot() -> None:
    a, b = sample_movie("a", 4).story(), sample_movie("b", 4).story()
    mixed = other_context(a, b)
    assert mixed.shots == [*b.shots[:-1], a.shots[-1]] and {c.tag for c in [*a.cast, *b.cast]} == {
        c.tag for c in mixed.cast
    }


class Rememberer:
    """A planner that draws perfectly what it was told, and forgets nothing: what scores should be at best."""

    @classmethod
    def from_preset(cls, preset: Preset, device: str) -> "Rememberer":
        return cls()

    def iterate(
        self, story: Story, seed: int, on_progress: object, known: dict[int, Image.Image]
    ) -> Iterator[Keyframe]:
        told: dict[str, Look] = {}
        for i, shot in enumerate(story.shots):
            setup, described = parse_caption(shot.caption)
            told |= described
            cast = {a.tag: told.get(a.tag, Look("white", "tall", "bare")) for a in setup.actors}
            image = known.get(i) or render_looks(sample_set(setup.place, random.Random(seed)), setup, cast)
            yield Keyframe(i, image, shot.caption, [])


def test_the_control_tells_memory_from_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KeyframePlanner", Rememberer)
    steps: list[tuple[int, int]] = []
    figures = evaluate_stories(TOY, 3, 3, 0, on_progress=lambda done, total, what: steps.append((done, total)))
    assert figures["attributes"] == figures["identity"] == figures["last_identity"] == 1
    assert figures["wrong_context_identity"] < 0.5
    assert figures["ci95"]["identity"] == [1, 1] and steps[-1] == (12, 12)
    assert figures["counts"]["wrong_context_identity"] == figures["counts"]["last_identity"] > 0


def test_who_is_only_shown_is_judged_by_the_shots_after(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Story, dict[int, Image.Image]]] = []

    class Looker(Rememberer):
        def iterate(self, story: Story, seed: int, on_progress: object, known: dict[int, Image.Image]) -> Iterator:
            asked.append((story, known))
            return super().iterate(story, seed, on_progress, known)

    monkeypatch.setattr(module, "KeyframePlanner", Looker)
    figures = evaluate_stories(TOY, 2, 9, 0, looks="unseen", given=6)
    assert len(asked) == 4 and all({*known} == {*range(6)} for _, known in asked[:2])
    assert not any(":" in shot.caption for story, _ in asked for shot in story.shots), "nobody is described"
    assert figures["attributes"] is None and figures["counts"]["identity"] > 0
    assert figures["identity"] < 0.5, "who never looks at pictures does not know anybody"
    assert 0 < figures["counts"]["together"] < figures["counts"]["identity"]
    movies = module._movies("heldout/0", 2, 9, "unseen", 6)
    assert all(look.held_out for movie in movies for look in movie.cast.values())
    with pytest.raises(UserError, match="8 of 8 shots are given, so there is nothing to plan"):
        evaluate_stories(TOY, 2, 8, given=8)


def test_untrained_weights_go_through_and_know_nothing(tmp_path: Path) -> None:
    preset = replace(tiny.preset(tiny.pipeline_folder(tmp_path), steps=1), tags=TOY.tags)
    assert isinstance(KeyframePlanner.from_preset(preset), KeyframePlanner)
    with pytest.warns(UserWarning, match="tokens"):  # the tiny text encoder reads 10
        figures = evaluate_stories(preset, 2, 2)
    assert figures["identity"] == figures["wrong_context_identity"] == 0 and figures["attributes"] < 0.5
    assert json.loads(json.dumps(figures)) == figures
