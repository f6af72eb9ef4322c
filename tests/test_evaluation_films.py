"""Films and storyboards as they are scored, and whoever judges them."""

import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import servers
import torch
from PIL import Image, ImageFilter

from cinema.chat import Endpoint
from cinema.cli import main
from cinema.config import TOY
from cinema.errors import UserError
from cinema.evaluation import (
    ASPECTS,
    MEASURES,
    Film,
    diversity,
    evaluate_films,
    fallen,
    judge_film,
    load_embedder,
    read_film,
    read_vbench,
    same_characters,
    score_keyframes,
    stress,
    true_judge,
)
from cinema.evaluation import stories as module
from cinema.media import film_writer
from cinema.story import save_story
from cinema.toyworld.draw import render, render_looks
from cinema.toyworld.film import write_films
from cinema.toyworld.reader import is_same_set
from cinema.toyworld.world import sample_movie, sample_set

MOVIE = sample_movie("scored", 5)
STORY = MOVIE.story()
TRUE = [render(MOVIE, setup) for setup in MOVIE.shots]
Answers = Callable[..., tuple[Endpoint, list[object]]]


def board(images: Sequence[Image.Image], path: Path = Path("board")) -> Film:
    return Film(path, STORY, [*images], [])


@pytest.fixture(scope="module")
def shot_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    write_films(1, 3, folder, shots=3)
    return next(folder.glob("*.mp4"))


def rewritten(film: Path, path: Path, change: Callable[[list[Image.Image]], list[Image.Image]], crf: int = 18) -> Path:
    """The same film with other frames."""
    frames = change([frame for shot in read_film(film).shots() for frame in shot])
    with film_writer(path, *frames[0].size, fps=8, crf=crf) as add:
        for frame in frames:
            add(frame)
    shutil.copy(film.with_suffix(".json"), path.with_suffix(".json"))
    return path


def test_a_set_is_known_again_in_shots_of_other_sizes_and_told_from_others_of_its_kind() -> None:
    same, other, rng = [], [], random.Random(0)
    for i in range(2):
        movie = sample_movie(f"sets/{i}", 6)
        first = movie.shots[0]
        for setup in (s for s in movie.shots[1:] if s.place == first.place):
            stranger = render_looks(sample_set(setup.place, rng), setup, movie.cast)
            shown = render(movie, first), first
            for told, image in ((same, render(movie, setup)), (other, stranger)):
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=60)
                told.append(is_same_set(*shown, Image.open(buffer), setup))
    assert len(same) > 5 and all(same) and not any(other)


def test_the_truth_is_judged_best_and_worse_films_worse() -> None:
    blurred = [image.filter(ImageFilter.GaussianBlur(4)) for image in TRUE]
    shuffled = TRUE[2:] + TRUE[:2]
    points = [true_judge(board(images)) for images in (TRUE, blurred, shuffled, TRUE[:1] * 5)]
    best, soft, mixed, still = points
    assert all(best[name] == 5 for name in best if name not in ("visual quality", "diversity"))
    assert best["visual quality"] > 4.9 and best["diversity"] > 4
    assert soft["visual quality"] < 4 and mixed["narrative coherence"] < 4 and still["diversity"] == 0
    assert [*best] == [*ASPECTS]
    stranger = Film(Path("dog"), STORY.model_copy(deep=True), [*TRUE], [])
    stranger.story.shots[0].caption = "A dog runs."
    with pytest.raises(UserError, match="dog: not a shot-list caption"):
        true_judge(stranger)


def test_a_film_of_the_toy_world_is_read_and_scored(shot_film: Path) -> None:
    film = read_film(shot_film)
    assert [len(frames) for frames in film.shots()] == film.counts and len(film.counts) == 3
    figures = evaluate_films([shot_film], TOY)
    mean, shots = figures["mean"], figures["films"][0]["shots"]
    assert mean["attributes"] == mean["identity"] == mean["sets"] == mean["camera"] == mean["actions"] == 1
    assert mean["cuts found"] == 1 and mean["diversity"] > 0.8 and "first frame, dB" not in mean, "it has no keyframes"
    assert len(shots) == 3 and {*MEASURES} < {*shots[0]} and figures["ci95"]["identity"] is None


def test_figures_order_good_and_bad_films_and_survive_another_encoding(shot_film: Path, tmp_path: Path) -> None:
    still = rewritten(shot_film, tmp_path / "still.mp4", lambda f: [f[17 * (i // 17)] for i in range(len(f))])
    rng = np.random.default_rng(0)

    def noisy(frames: list[Image.Image]) -> list[Image.Image]:
        light = [1 + 0.3 * float(rng.standard_normal()) for _ in frames]
        return [frame.point(lambda v, k=k: int(v * k)) for frame, k in zip(frames, light, strict=True)]

    flickering = rewritten(shot_film, tmp_path / "flicker.mp4", noisy)
    coarse = rewritten(shot_film, tmp_path / "coarse.mp4", lambda f: f, crf=28)
    good, dead, shaky, again = (evaluate_films([p], TOY)["mean"] for p in (shot_film, still, flickering, coarse))
    assert dead["dynamic degree"] == 0 < good["dynamic degree"] and dead["flicker"] > good["flicker"] > shaky["flicker"]
    assert dead["subject consistency"] > good["subject consistency"] and dead["actions"] < good["actions"]
    names = ("attributes", "identity", "sets", "cuts found", "diversity", "dynamic degree")
    assert [again[name] for name in names] == [good[name] for name in names]
    for name, tolerance in {"text alignment": 0.02, "subject consistency": 0.03, "flicker": 0.003}.items():
        assert again[name] == pytest.approx(good[name], abs=tolerance)


def test_captions_of_another_story_fit_worse(shot_film: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.mp4"
    shutil.copy(shot_film, other)
    told = json.loads(shot_film.with_suffix(".json").read_text())
    lines = [shot["caption"] for shot in told["story"]["shots"]]
    for shot, line in zip(told["story"]["shots"], [*lines[1:], *lines[:1]], strict=True):
        shot["caption"] = line
    other.with_suffix(".json").write_text(json.dumps(told))
    right, wrong = (evaluate_films([p], TOY)["mean"] for p in (shot_film, other))
    assert wrong["text alignment"] < right["text alignment"] and wrong["attributes"] < right["attributes"]


def test_who_embeds_decides_who_is_the_same() -> None:
    def by_number(images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.eye(len(images))

    assert not any(same_characters(STORY, TRUE, by_number))
    alike = same_characters(STORY, TRUE, lambda images: torch.ones(len(images), 2))
    assert all(alike) and len(alike) == sum(len(s.tags) for s in STORY.shots) - len(STORY.first_appearances())
    assert diversity([TRUE[0], TRUE[1], TRUE[0]]) == [True, False, True]
    assert load_embedder("torch:ones") is torch.ones
    with pytest.raises(UserError, match="no such function"):
        load_embedder("torch:nobody")


def test_films_without_their_story_are_refused_in_one_sentence(shot_film: Path, tmp_path: Path, capsys) -> None:
    alone = tmp_path / "alone.mp4"
    shutil.copy(shot_film, alone)
    manifest, told = alone.with_suffix(".json"), json.loads(shot_film.with_suffix(".json").read_text())
    for content, message in (
        ("", "no story beside it"),
        ("{", "not the story of a readable film"),
        (json.dumps(told | {"shots": told["shots"][:-1]}), "tells of 2 shots"),
    ):
        if content:
            manifest.write_text(content)
        assert main(["evaluate", str(alone)]) == 1
        assert message in (said := " ".join(capsys.readouterr().err.split())) and said.count(". ") == 0
    assert main(["evaluate", str(tmp_path)]) == 1 and "no story.yaml" in capsys.readouterr().err


def test_the_page_and_the_files_for_vbench(shot_film: Path, tmp_path: Path, capsys) -> None:
    page, bench, figures = tmp_path / "page", tmp_path / "vbench", tmp_path / "figures.json"
    told = ["evaluate", str(shot_film), "--judge", "truth", "--report", str(page), "--vbench", str(bench)]
    assert main([*told, "--json", str(figures)]) == 0 and "identity" in capsys.readouterr().out
    html, prompts = (page / "index.html").read_text(), json.loads((bench / "prompts.json").read_text())
    assert html.count("<img") == 3 and "<script" not in html
    assert len(prompts) == 3 and all(Path(video).is_file() and "<" not in said for video, said in prompts.items())
    assert json.loads(figures.read_text())["films"][0]["judge"]["character consistency"] == 5
    results = tmp_path / "eval_results.json"
    results.write_text(json.dumps({"dynamic_degree": [0.5, [{"video_path": "a.mp4", "video_results": True}]]}))
    assert read_vbench(results) == {"dynamic_degree": 0.5}
    with pytest.raises(UserError, match="no results of VBench"):
        read_vbench(bench / "prompts.json")


def test_a_storyboard_has_keyframes_and_no_videos(tmp_path: Path) -> None:
    story = STORY.model_copy(deep=True, update={"shots": STORY.shots[:2]})
    for i, shot in enumerate(story.shots):
        shot.keyframe = f"{i}.png"
    save_story(story, tmp_path / "story.yaml")
    TRUE[0].save(tmp_path / "0.png")
    with pytest.raises(UserError, match="shot 2 has no keyframe"):
        read_film(tmp_path)
    TRUE[1].save(tmp_path / "1.png")
    with pytest.raises(UserError, match="has no videos"):
        evaluate_films([tmp_path], TOY, vbench=tmp_path / "vbench")
    assert evaluate_films([tmp_path], TOY)["mean"]["attributes"] == 1


def verdicts(points: int) -> str:
    answer = {name.replace(" ", "_"): {"points": points, "reason": "shot 1"} for name in ASPECTS}
    message = {"role": "assistant", "content": json.dumps(answer)}
    usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop", "index": 0}], "usage": usage})


def test_a_judge_is_asked_in_another_order_each_time_and_never_twice(tmp_path: Path) -> None:
    journal = tmp_path / "judge.jsonl"
    with servers.endpoints() as start:
        server, asked = start(lambda count: verdicts(2 + count))
        told = judge_film(board(TRUE), server, journal, times=2, retries=0)
        assert told["aspects"]["aesthetics"] == {"mean": 3.5, "spread": 0.5, "reasons": ["shot 1"] * 2}
        assert told["failed"] == [] and told["tokens"] == 200
        prompts = [heard["messages"][0]["content"] for heard in asked]
        assert prompts[0] != prompts[1] and sorted(prompts[0].split("\n")) == sorted(prompts[1].split("\n"))
        assert judge_film(board(TRUE), server, journal, times=2, retries=0) == told and len(asked) == 2


def test_what_a_judge_says_wrongly_is_reported_and_the_rest_stands(tmp_path: Path) -> None:
    def answer(count: int) -> str:
        bad = json.dumps({"choices": [{"message": {"content": "Nice film!"}, "finish_reason": "stop", "index": 0}]})
        return verdicts(5) if count == 3 else bad if count < 3 else verdicts(6)

    with servers.endpoints() as start:
        told = judge_film(board(TRUE), start(answer)[0], tmp_path / "journal", times=3, retries=0)
        assert len(told["failed"]) == 2 and told["aspects"]["diversity"]["mean"] == 5
        dead = judge_film(board(TRUE), start(lambda count: "", 500)[0], tmp_path / "other", times=2, retries=0)
        assert dead["aspects"] == {} and len(dead["failed"]) == 2 and "500" in dead["failed"][0]
        with pytest.raises(UserError, match="401"):
            judge_film(board(TRUE), start(lambda count: "", 401)[0], tmp_path / "third", retries=0)


def test_the_stress_test_compares_memories_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    asked = list[tuple[int, int]]()

    def scored(preset, stories: int, shots: int, seed: int, **told) -> dict[str, object]:
        asked.append((shots, preset.keyframes.memory_levels))
        if len(asked) == 3:
            raise KeyboardInterrupt
        share = {"identity": 0.5, "attributes": 0.9, "sets": 0.25, "wrong_context_identity": 0.0}
        return share | {"ci95": {name: [0.0, 1.0] for name in share}}

    monkeypatch.setattr(module, "evaluate_stories", scored)
    path = tmp_path / "stress.json"
    with pytest.raises(KeyboardInterrupt):
        stress(TOY, (4, 30), 3, 0, path)
    rows = stress(TOY, (4, 30), 3, 0, path)
    assert asked == [(4, 5), (4, 1), (30, 5), (30, 5), (30, 1)], "whole rows are kept"
    assert [(row["pairs"], row["memory"]) for row in rows] == [
        (4, "goldenmem"),
        (4, "full"),
        (30, "goldenmem"),
        (30, "full"),
    ]
    assert rows[0]["tflop"] == rows[1]["tflop"] and rows[2]["tflop"] < 0.5 * rows[3]["tflop"]
    other = stress(TOY.remembering(retrieval="clip"), (4,), 3, 0, path)
    assert len(asked) == 7 and json.loads(path.read_text()) == other + rows, "rows of other settings stay beside"
    assert stress(TOY, (30, 4), 3, 0, path) == rows[2:] + rows[:2] and len(asked) == 7
    assert {"pairs", "memory", "sets", "ci95"} < {*rows[0]}


def test_figures_that_fall_are_named() -> None:
    old = {"identity": 0.9, "sets": 0.5, "ci95": {"identity": [0.85, 0.95], "sets": None}}
    assert fallen(old | {"identity": 0.86}, old) == [] and fallen(old | {"sets": 0.0}, old) == []
    assert fallen([old, old | {"identity": 0.8}], [old, old]) == ["2 identity is 0.800, it was 0.850 or more"]
    assert fallen([], [old]) == ["1 identity is None, it was 0.850 or more"] and fallen({}, {}) == []
    assert fallen([old], {}) == []


def test_scores_of_sets_begin_with_the_second_picture() -> None:
    scores = score_keyframes(MOVIE.captions(), TRUE)
    assert scores.sets == [True] * (len(MOVIE.shots) - len({s.place for s in MOVIE.shots})) != []
