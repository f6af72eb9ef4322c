import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import pytest
import tiny
import tiny_video
from PIL import Image
from test_media import read_frames

import cinema.movie
from cinema.config import Preset
from cinema.curation import GroundTruthAnnotator
from cinema.errors import UserError
from cinema.movie import animate_storyboard, make_movie, plan_storyboard, weights_identity
from cinema.provenance import verify
from cinema.story import Character, Shot, Story, load_story, save_story

CAPTIONS = ["wide shot, forest. <ada> left, jumping.", "close shot, city. <bo> right, jumping.", "wide shot, city."]

KILLED_AT = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import tiny_video
from pathlib import Path
from cinema.movie import make_movie
from cinema.story import load_story

def kill(done, total, message):
    if message.startswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

preset = tiny_video.preset(*(Path(os.environ[f"CINEMA_{name}_WEIGHTS"]) for name in ("KEYFRAME", "VIDEO")))
make_movie(load_story(sys.argv[1]), Path(sys.argv[2]), preset, 5, on_progress=kill)
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    folder = tmp_path_factory.mktemp("weights")
    return tiny_video.preset(tiny.pipeline_folder(folder / "keyframes"), tiny_video.pipeline_folder(folder / "video"))


def story(captions: list[str] = CAPTIONS) -> Story:
    cast = [Character(tag="<ada>", description="red round, crown"), Character(tag="<bo>", description="blue tall, bow")]
    return Story(title="a test", cast=cast, shots=[Shot(caption=c) for c in captions])


@pytest.fixture(scope="module")
def film(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_movie(story(), tmp_path_factory.mktemp("film") / "film.mp4", preset, seed=5).film


def test_a_film_has_its_shots_and_its_papers(film: Path) -> None:
    frames = read_frames(film)
    assert len(frames) == 27 and frames[0].size == (128, 64)
    manifest = json.loads(film.with_suffix(".json").read_text())
    assert [s["start_frame"] for s in manifest["shots"]] == [0, 9, 18] and manifest["film"]["frames"] == 27
    assert [k["remembered"] for k in manifest["keyframes"]] == [[], [[0, 4]], [[0, 2], [1, 4]]]
    assert manifest["preset"]["video"]["steps"] == 2 and manifest["seed"] == 5
    assert len(manifest["weights"]["keyframes"]) == len(manifest["weights"]["video"]) == 64
    assert Story.model_validate(manifest["story"]).shots[1].caption == CAPTIONS[1]
    assert GroundTruthAnnotator().cast(film) == story().cast  # a film of ours can be curated like a toy film
    with Image.open(film.with_suffix(".storyboard.png")) as picture:
        assert picture.width > 3 * 128
    assert not list(film.parent.rglob(".*part*"))
    with av.open(str(film)) as container:
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == CAPTIONS
    cues = film.with_suffix(".vtt").read_text().split("\n\n")
    assert len(cues) == 4 and cues[1].endswith(CAPTIONS[0].replace("<", "&lt;").replace(">", "&gt;"))


def test_a_film_is_marked_and_signed_unless_that_is_switched_off(film: Path, preset: Preset, tmp_path: Path) -> None:
    verdict, manifest = verify(film), json.loads(film.with_suffix(".json").read_text())
    assert verdict.watermark and verdict.payload == manifest["run"] == verdict.told["run"]
    assert verdict.credentials == "valid" and manifest["signed"] and manifest["concerns"] == []
    assert verdict.told["keyframes_model"] == manifest["weights"]["keyframes"] and verdict.told["seed"] == 5
    keyframe = verify(film.with_suffix(".work") / "keyframes" / "001.png")
    assert keyframe.payload == manifest["keyframes"][1]["recipe"][:7] and keyframe.credentials == "absent"
    plain = make_movie(story(), tmp_path / "plain.mp4", preset, 5, marked=False)
    verdict = verify(plain.film)
    assert not verdict.watermark and verdict.credentials == "absent"
    assert not verify(plain.keyframes[1]).watermark and not json.loads(plain.manifest.read_text())["signed"]


def test_a_story_with_a_real_person_is_not_begun(preset: Preset, tmp_path: Path) -> None:
    told = story(["wide shot, forest. <ada> left, and Tom Hanks."])
    for begin in (make_movie, plan_storyboard):
        with pytest.raises(UserError, match="Tom Hanks is a real person"):
            begin(told, tmp_path / "film.mp4", preset)
    assert not [*tmp_path.iterdir()]


def test_killed_twice_it_ends_with_the_same_film(film: Path, preset: Preset, tmp_path: Path) -> None:
    """kill -9 while the second keyframe is drawn, then while the second window of shots is."""
    script = tmp_path / "story.yaml"
    script.write_text(json.dumps(story().model_dump(exclude_unset=True)))  # JSON is YAML; no durations
    out, tests = tmp_path / "again.mp4", str(Path(__file__).parent)
    weights = {"CINEMA_KEYFRAME_WEIGHTS": preset.keyframes.weights, "CINEMA_VIDEO_WEIGHTS": preset.video.weights}
    for message, keyframes, shots in (("keyframe 2", 1, 0), ("shots 3", 3, 2)):
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            KILLED_AT,
            str(script),
            str(out),
            tests,
            message,
        ]
        ran = subprocess.run(command, env=os.environ | weights, capture_output=True, check=False)
        assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
        assert len(list(tmp_path.rglob("0*.png"))) == keyframes and len(list(tmp_path.rglob("0*.tiff"))) == shots
        assert not out.exists()
    result = make_movie(story(), out, preset, seed=5)
    assert result.film.read_bytes() == film.read_bytes()
    papers = [json.loads(f.with_suffix(".json").read_text()) for f in (film, out)]
    for paper in papers:
        assert paper["film"].pop("file")
    assert papers[0] == papers[1]


def test_a_finished_film_is_not_made_again(film: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    before = film.read_bytes()
    for maker in (cinema.movie.KeyframePlanner, cinema.movie.Animator):
        monkeypatch.setattr(maker, "from_preset", lambda *_: pytest.fail("nothing is left to do"))
    film.unlink()
    assert make_movie(story(), film, preset, seed=5).film.read_bytes() == before


@pytest.mark.parametrize("other", ["seed", "story", "steps", "weights"])
def test_work_of_another_film_is_refused(other: str, film: Path, preset: Preset, tmp_path: Path) -> None:
    told, seed = story(CAPTIONS[:2]) if other == "story" else story(), 6 if other == "seed" else 5
    if other == "steps":
        preset = replace(preset, keyframes=replace(preset.keyframes, steps=3))
    if other == "weights":
        preset = replace(preset, keyframes=replace(preset.keyframes, weights=str(tmp_path)))
    with pytest.raises(UserError, match=f"work of another film .*{other}.* differ"):
        make_movie(told, film, preset, seed)


def test_plan_then_animate_is_the_same_film(film: Path, preset: Preset, tmp_path: Path) -> None:
    board = plan_storyboard(story(), tmp_path / "board", preset, seed=5)
    assert [p.name for p in board.keyframes] == ["000.png", "001.png", "002.png"] and board.storyboard.is_file()
    told = load_story(board.manifest.parent / "story.yaml")
    assert told.shots[2].keyframe == "keyframes/002.png" and told.shots[0].duration == 9 / 8
    assert json.loads(board.manifest.read_text())["keyframes"][2]["caption"] == CAPTIONS[2]
    result = animate_storyboard(board.manifest.parent, tmp_path / "film.mp4", preset, seed=5)
    assert result.film.read_bytes() == film.read_bytes()


def test_a_shot_drawn_again_leaves_the_others(preset: Preset, tmp_path: Path) -> None:
    board, out = plan_storyboard(story(), tmp_path / "board", preset, seed=5), tmp_path / "film.mp4"
    with pytest.raises(UserError, match="0 of 3 shots are there"):
        animate_storyboard(board.manifest.parent, out, preset, 5, again=[1])
    films = []
    for options in ({}, {"again": [1], "take": 1}, {"again": [1], "take": 2}, {"again": [1], "take": 1}, {}):
        result = animate_storyboard(board.manifest.parent, out, preset, 5, **options)
        frames = [frame.tobytes() for frame in read_frames(result.film)]
        takes = [shot["take"] for shot in json.loads(result.manifest.read_text())["shots"]]
        assert takes == [0, options.get("take", 1 if films else 0), 0]
        tiffs = [(tmp_path / "film.work" / "shots" / f"{i:03d}.tiff").read_bytes() for i in range(3)]
        films.append((frames, tiffs))
    assert len({tiffs[0] for _, tiffs in films}) == len({tiffs[2] for _, tiffs in films}) == 1
    assert len({tiffs[1] for _, tiffs in films}) == 3 and films[1] == films[3] == films[4]
    with pytest.raises(UserError, match="count from 1"):
        animate_storyboard(board.manifest.parent, out, preset, 5, again=[3])


def test_a_keyframe_drawn_by_hand_is_animated(preset: Preset, tmp_path: Path) -> None:
    Image.new("RGB", (256, 128), "red").save(tmp_path / "mine.png")
    save_story(Story(title="mine", shots=[Shot(caption="a red wall", keyframe="mine.png")]), tmp_path / "story.yaml")
    result = animate_storyboard(tmp_path, tmp_path / "film.mp4", preset)
    assert (
        len(read_frames(result.film)) == 17
        and "remembered" not in json.loads(result.manifest.read_text())["keyframes"][0]
    )


def test_bad_storyboards_are_one_sentence(preset: Preset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no storyboard; make one with `cinema plan`"):
        animate_storyboard(tmp_path, tmp_path / "film.mp4", preset)
    save_story(Story(title="x", shots=[Shot(caption="y")]), tmp_path / "story.yaml")
    with pytest.raises(UserError, match="shot 0 names no keyframe"):
        animate_storyboard(tmp_path, tmp_path / "film.mp4", preset)
    save_story(Story(title="x", shots=[Shot(caption="y", keyframe="gone.png")]), tmp_path / "story.yaml")
    with pytest.raises(UserError, match=r"gone\.png: this keyframe is missing"):
        animate_storyboard(tmp_path, tmp_path / "film.mp4", preset)


def test_a_story_beside_is_not_overwritten(preset: Preset, tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"already has story\.yaml"):
        plan_storyboard(story(), tmp_path, preset)
    assert (tmp_path / "story.yaml").read_text() == "mine"


def test_bad_places_are_one_sentence(preset: Preset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.mp4 or \.webm"):
        make_movie(story(), tmp_path / "film.avi", preset)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        make_movie(story(), tmp_path / "file" / "film.mp4", preset)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match="cannot be written there"):
        make_movie(story(), tmp_path / "folder.mp4", preset)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.mp4"]


def test_a_json_that_is_not_this_films_manifest_is_not_replaced(film: Path, preset: Preset, tmp_path: Path) -> None:
    for name, text in (("film.json", '{"title": "my story"}'), ("other.json", film.with_suffix(".json").read_text())):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"already has {name}, not of this work"):
            make_movie(story(), (tmp_path / name).with_suffix(".mp4"), preset)
        assert (tmp_path / name).read_text() == text


def test_a_start_that_failed_leaves_the_folder_free(preset: Preset, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{}")
    for part in ("keyframes", "video"):
        wrong = replace(preset, **{part: replace(getattr(preset, part), weights=str(broken))})
        with pytest.raises(UserError, match="cannot be loaded"):
            make_movie(story(), tmp_path / "film.mp4", wrong)
    assert make_movie(story(CAPTIONS[:1]), tmp_path / "one.mp4", preset).film.is_file()
    assert make_movie(story(), tmp_path / "film.mp4", preset).film.is_file()


def test_on_a_full_disk_finished_shots_stay(preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cinema.movie, "_join", full)
        with pytest.raises(OSError, match="No space left"):  # of which the command line makes a sentence
            make_movie(story(), tmp_path / "film.mp4", preset, seed=5)
    assert len(list(tmp_path.rglob("*.tiff"))) == 3 and not (tmp_path / "film.mp4").exists()


def test_weights_are_told_apart_by_what_they_are(preset: Preset, tmp_path: Path) -> None:
    video = Path(preset.video.weights)
    assert weights_identity(str(video)) != weights_identity(preset.keyframes.weights)
    assert weights_identity("Lightricks/LTX-Video") == "Lightricks/LTX-Video"
    copy = shutil.copytree(video, tmp_path / "elsewhere")
    assert weights_identity(str(copy)) == weights_identity(str(video))
    settings = copy / "tokenizer" / "tokenizer_config.json"  # another tokenizer draws other pictures
    settings.write_text(settings.read_text() + " ")
    assert weights_identity(str(copy)) != weights_identity(str(video))


def test_after_an_edit_only_what_depends_on_it_is_planned_again(preset: Preset, tmp_path: Path, monkeypatch) -> None:
    drawn, draw = [], cinema.movie.KeyframePlanner._draw

    def watched(self, captions, *rest):
        drawn.extend(captions)
        return draw(self, captions, *rest)

    monkeypatch.setattr(cinema.movie.KeyframePlanner, "_draw", watched)
    edited = story([CAPTIONS[0], CAPTIONS[2], CAPTIONS[1]])
    plan_storyboard(story(), tmp_path / "board", preset, seed=5)
    assert drawn == CAPTIONS[:3]
    with pytest.raises(UserError, match="its story differ"):
        plan_storyboard(edited, tmp_path / "board", preset, seed=5)
    drawn.clear()
    again = plan_storyboard(edited, tmp_path / "board", preset, seed=5, edited=True)
    assert drawn == [CAPTIONS[2], CAPTIONS[1]]
    fresh = plan_storyboard(edited, tmp_path / "fresh", preset, seed=5)
    assert [p.read_bytes() for p in again.keyframes] == [p.read_bytes() for p in fresh.keyframes]
    assert again.manifest.read_bytes() == fresh.manifest.read_bytes()
    drawn.clear()
    plan_storyboard(edited, tmp_path / "board", preset, seed=5, edited=True)
    assert drawn == []
    short = plan_storyboard(story(CAPTIONS[:1]), tmp_path / "board", preset, seed=5, edited=True)
    assert drawn == [] and [p.name for p in short.keyframes] == ["000.png"]
    Image.new("RGB", (300, 100), "red").save(short.keyframes[0])  # by hand: it stays, and is remembered
    plan_storyboard(story(CAPTIONS[:2]), tmp_path / "board", preset, seed=5, edited=True)
    assert drawn == [CAPTIONS[1]]
    with Image.open(short.keyframes[0]) as mine:
        assert mine.size == (300, 100)
    with pytest.raises(UserError, match="its seed differ"):
        plan_storyboard(story(CAPTIONS[:2]), tmp_path / "board", preset, seed=6, edited=True)


def test_an_edit_that_was_stopped_is_gone_on_with(preset: Preset, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    edited = story([CAPTIONS[0], CAPTIONS[2], CAPTIONS[1]])
    plan_storyboard(story(), tmp_path / "board", preset, seed=5)
    with pytest.raises(KeyboardInterrupt):
        plan_storyboard(edited, tmp_path / "board", preset, 5, stop, edited=True)
    again, fresh = (plan_storyboard(edited, tmp_path / name, preset, seed=5) for name in ("board", "fresh"))
    assert [p.read_bytes() for p in again.keyframes] == [p.read_bytes() for p in fresh.keyframes]
    assert again.manifest.is_file()


def test_after_a_picture_by_hand_what_follows_is_planned_again(preset: Preset, tmp_path: Path) -> None:
    board = plan_storyboard(story(), tmp_path / "board", preset, seed=5)
    before = [path.read_bytes() for path in board.keyframes]
    Image.new("RGB", (300, 150), "red").save(board.keyframes[1])
    mine = board.keyframes[1].read_bytes()
    plan_storyboard(story(), tmp_path / "board", preset, seed=5, edited=True)
    after = [path.read_bytes() for path in board.keyframes]
    assert after[0] == before[0] and after[1] == mine and after[2] != before[2]


def test_a_board_of_ratios_one_by_one_is_gone_on_with(preset: Preset, tmp_path: Path) -> None:
    graded = preset.remembering(memory_ratio=(2.0,))
    boards = [plan_storyboard(story(), tmp_path / "board", graded, seed=5) for _ in range(2)]
    assert boards[0].manifest.read_bytes() == boards[1].manifest.read_bytes()
