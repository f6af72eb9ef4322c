import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cinema.cli import main
from cinema.curation import CurationReport
from cinema.story import load_story
from cinema.toyworld.world import parse_caption

SHOT = '  - {caption: "wide shot, forest. <ada> left, jumping: red round, crown. pan left."}\n'
HEAD = "title: A walk\ncast:\n  - {tag: <ada>}\nshots:\n"
BAD_STORIES = {
    "unknown tag": (HEAD + SHOT.replace("<ada>", "<bob>"), "<bob> is not in the cast"),
    "negative duration": (HEAD + SHOT.replace("}", ", duration: -2}"), "greater than 0"),
    "no shots": ("title: A walk\nshots: []\n", "at least 1 item"),
    "not YAML": (HEAD + "  - {caption: [\n", "not valid YAML"),
    "10,000 shots": (HEAD + SHOT * 10_000, "at most 5000 items after validation, not 10000"),
    "empty": ("", "not a story"),
    "rich markup": (HEAD + SHOT.replace("duration", "x").replace("}", ', "[red]bold[/oops]": 1}'), "[red]bold[/oops]"),
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("CINEMA_DEBUG", "CINEMA_PRESET", "CINEMA_LLM_BASE_URL", "CINEMA_LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)


def story_commands(story: Path, out: Path) -> list[list[str]]:
    """Every command offered that reads a story."""
    return [["movie", str(story), "-o", str(out / "film.mp4")], ["plan", str(story), "-o", str(out)]]


def one_sentence(capsys) -> str:
    """What a failed command said: exactly one line on standard error, nothing on standard output."""
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    return err.strip()


# --- writing ---


def test_write_makes_a_story_and_says_what_it_read(tmp_path, capsys):
    (tmp_path / "line.txt").write_text("Ada hops through the woods, humming. Bo waves.", encoding="utf-8")
    assert main(["write", str(tmp_path / "line.txt"), "-o", str(tmp_path / "s.yaml")]) == 0
    story = load_story(tmp_path / "s.yaml")
    assert story.title == "Ada and Bo: forest"
    assert [parse_caption(s.caption)[0].place for s in story.shots] == ["forest", "forest"]
    out, err = capsys.readouterr()
    assert "“hops” = jumping" in out and "Left out:" in out and "“humming”" in out
    assert "shots 2, characters 2, sets 1" in err


@pytest.mark.parametrize("content", [b"", b"blorp fizz.", b"\xff\xfe\x00\x01", None])
def test_a_storyline_that_cannot_be_read_is_one_sentence_and_leaves_nothing(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "line.txt").write_bytes(content)
    assert main(["write", str(tmp_path / "line.txt"), "-o", str(tmp_path / "s.yaml")]) == 1
    one_sentence(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["line.txt"] * (content is not None)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "line.txt").write_text("Ada jumps.")
    (tmp_path / "file").write_text("")
    assert main(["write", str(tmp_path / "line.txt"), "-o", str(tmp_path / "file" / "s.yaml")]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and str(tmp_path / "file") in err


# --- bad stories, through every command that reads one ---


@pytest.mark.parametrize("kind", BAD_STORIES)
def test_a_bad_story_is_one_sentence_and_leaves_nothing(kind, tmp_path, capsys):
    text, says = BAD_STORIES[kind]
    (tmp_path / "s.yaml").write_text(text)
    out = tmp_path / "out"
    for command in story_commands(tmp_path / "s.yaml", out):
        assert main(command) == 1
        assert says in one_sentence(capsys)
        assert not out.exists()


def test_an_unknown_preset_is_one_sentence(tmp_path, capsys):
    assert main(["curate", "x.mp4", "-o", str(tmp_path), "--preset", "huge"]) == 1
    assert "choose one of toy, small, flux" in one_sentence(capsys)


# --- curation ---


def film(path: Path, frames: int = 12) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_curate_reports_each_film_and_exits_3_when_some_failed(tmp_path, capsys):
    good, bad, figures = film(tmp_path / "good.mp4"), tmp_path / "missing.mp4", tmp_path / "figures.json"
    assert main(["curate", str(good), "-o", str(tmp_path / "out"), "--json", str(figures)]) == 0
    assert [f["status"] for f in json.loads(figures.read_text())["films"]] == ["ok"]
    assert main(["curate", str(good), str(bad), "-o", str(tmp_path / "out"), "--json", str(figures)]) == 3
    films = json.loads(figures.read_text())["films"]
    assert [f["status"] for f in films] == ["ok", "failed"] and films[0]["skipped"] is True
    assert "1 of 2 films could not be curated" in capsys.readouterr().err


# --- the frame of it all ---


@pytest.mark.parametrize(
    "arguments",
    [
        *(["write"], ["frobnicate"], ["plan", "--frob"], ["plan", "x", "-o", "y", "--mask", "z"]),
        *(["budget", "--pairs", "4,x"], ["budget", "--pairs", "0"], ["curate", "x", "--annotator", "me"]),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    command = "cinema" if arguments == ["frobnicate"] else f"cinema {arguments[0]}"
    assert f"`{command} --help`" in one_sentence(capsys)


def test_no_arguments_is_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "write" in text and "curate" in text and "bench" in text


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from cinema.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'av') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.strip() == "[]"


def test_an_interruption_is_one_sentence(monkeypatch, tmp_path, capsys):
    def interrupted(*args, **kwargs) -> CurationReport:
        raise KeyboardInterrupt

    monkeypatch.setattr("cinema.curation.curate", interrupted)
    assert main(["curate", "x.mp4", "-o", str(tmp_path)]) == 1
    assert "stopped" in capsys.readouterr().err


def test_a_fault_of_ours_is_one_sentence_unless_debugging(monkeypatch, tmp_path, capsys):
    def broken(*args, **kwargs) -> CurationReport:
        raise RuntimeError("the\nroof fell in")

    monkeypatch.setattr("cinema.curation.curate", broken)
    assert main(["curate", "x.mp4", "-o", str(tmp_path)]) == 1
    assert "RuntimeError: the roof fell in; set CINEMA_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("CINEMA_DEBUG", "1")
    with pytest.raises(RuntimeError, match="roof"):
        main(["curate", "x.mp4", "-o", str(tmp_path)])


def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path, capsys):
    def full(*args, **kwargs) -> CurationReport:
        raise OSError(28, "No space left on device", "film.mp4")

    monkeypatch.setattr("cinema.curation.curate", full)
    assert main(["curate", "x.mp4", "-o", str(tmp_path)]) == 1
    assert one_sentence(capsys) == "film.mp4: No space left on device; free or choose another place"


def test_figures_that_cannot_be_kept_are_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "figures.json"):
        assert main(["budget", "--json", str(path)]) == 1
        said = capsys.readouterr()
        assert "cannot be written there" in said.err and not said.out


def test_a_story_is_written_as_yaml_and_never_over_its_storyline(tmp_path, capsys):
    line = tmp_path / "line.txt"
    line.write_text("Ada walks through the forest.")
    assert main(["write", str(line), "-o", str(line)]) == 1
    assert "ends in .yaml" in capsys.readouterr().err and line.read_text() == "Ada walks through the forest."


def test_toyworld_films_have_what_is_asked_for(tmp_path):
    more = ["--shots", "3", "--transitions", "--titles", "--letterbox", "16"]
    assert main(["toyworld", "-o", str(tmp_path), *more]) == 0
    truth = json.loads((tmp_path / "film-0-00000.json").read_text())
    assert truth["bars"] == [16, 16] and len(truth["shots"]) == 3
    assert len(truth["cuts"]) > 3 and {shot["transition"] for shot in truth["shots"]} > {"cut"}


def test_bench_of_curation_is_a_row_per_detector(tmp_path, capsys):
    assert main(["toyworld", "-o", str(tmp_path), "--shots", "4"]) == 0
    assert main(["bench", "curate", str(tmp_path), "--json", str(tmp_path / "f.json")]) == 0
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "f.json").read_text())
    assert "planes" in out and "content" in out and "share of the speed of decoding" in out
    assert figures["planes"]["found"] + figures["planes"]["missed"] > 0
    peaks = {name: cost["peak MiB"] for name, cost in figures["speed"].items() if isinstance(cost, dict)}
    assert len(peaks) == 4 and min(peaks.values()) > 20


def test_doctor_says_what_is_here_and_no_secret(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CINEMA_LLM_BASE_URL", "http://me:secret@example.org/v1")
    monkeypatch.setenv("CINEMA_LLM_API_KEY", "secret")
    (tmp_path / "transformer").mkdir()
    for name in ("model_index.json", "transformer/model.safetensors"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setenv("CINEMA_KEYFRAME_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("CINEMA_VIDEO_WEIGHTS", str(tmp_path / "none"))
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    facts = json.loads((tmp_path / "d.json").read_text())
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and "torch" in facts and "device" in facts
    assert facts["preset toy"] == f"weights missing: video ({tmp_path / 'none'})"
    assert facts["language model"].startswith("set") and "h264" in facts["video codecs"]
    monkeypatch.setenv("CINEMA_VIDEO_WEIGHTS", str(tmp_path))
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    assert json.loads((tmp_path / "d.json").read_text())["preset toy"] == "weights present"
    assert "secret" not in capsys.readouterr().out
