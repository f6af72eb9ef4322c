"""The user study: what raters see does not tell the run, and what they say comes back."""

import json
import shutil
from pathlib import Path

import pytest
from browser import Chromium, opened

from cinema.cli import main
from cinema.evaluation.study import agreement, read_study, write_study
from cinema.toyworld.film import write_films

ANSWER = """(() => {
  document.querySelectorAll("section").forEach((section, i) => {
    section.querySelectorAll("fieldset").forEach((field, j) => field.querySelectorAll("input")[(i + j) % 4].click());
    if (i < document.querySelectorAll("section").length - 1) document.getElementById("next").click();
  });
  return fetch(document.getElementById("save").href).then(reply => reply.text());
})()"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("study")
    write_films(2, 0, folder / "ours", shots=2)
    shutil.copytree(folder / "ours", folder / "theirs")
    return [folder / "ours", folder / "theirs"]


def ask(chromium: Chromium, script: str) -> object:
    answer = chromium.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
    return answer["result"].get("value")


def test_a_rater_answers_in_a_browser_and_the_answers_are_read(runs: list[Path], tmp_path: Path, capsys) -> None:
    study, key = tmp_path / "study", tmp_path / "study.key.json"
    assert main(["study", "write", *map(str, runs), "-o", str(study)]) == 0
    page = (study / "index.html").read_text()
    assert "ours" not in page and "theirs" not in page and not list(study.glob("*.json")), "raters see no names"
    assert len({*json.loads(key.read_text())}) == 4 == len(list((study / "films").glob("*.mp4")))
    with opened(tmp_path / "profile") as chromium:
        assert chromium.open(study / "index.html")["files"] == []
        before = "[document.getElementById('next').disabled, document.getElementById('save').hidden]"
        assert ask(chromium, before) == [True, True], "nothing is saved before all is answered"
        told = str(ask(chromium, ANSWER))
    (tmp_path / "a.csv").write_text(told)
    figures = read_study(key, [tmp_path / "a.csv", tmp_path / "a.csv"])
    assert told.count("\n") == 5 and figures["agreement"] == {"quality": 1.0, "alignment": 1.0}
    assert [figures["runs"][run]["quality"]["ratings"] for run in ("ours", "theirs")] == [4, 4]
    points = [line.split(",")[2:] for line in told.splitlines()[1:]]
    every = [int(point) for row in points for point in row]
    means = [figures["runs"][run][asked]["mean"] for run in ("ours", "theirs") for asked in ("quality", "alignment")]
    assert sum(means) / 4 == pytest.approx(sum(every) / 8) and {*every} <= {1, 2, 3, 4}
    assert main(["study", "read", str(key), str(tmp_path / "a.csv")]) == 0 and "ours" in capsys.readouterr().out


def test_what_cannot_be_compared_or_read_is_said_in_one_sentence(runs: list[Path], tmp_path: Path, capsys) -> None:
    assert main(["study", "write", str(runs[0]), "-o", str(tmp_path / "s")]) == 1
    assert "1 runs have 2 films in common" in capsys.readouterr().err
    page = write_study(runs, tmp_path / "s")
    key, wrong = tmp_path / "s.key.json", tmp_path / "wrong.csv"
    film = next(iter(json.loads(key.read_text())))
    assert page.is_file()
    for text in (f"item,film,quality,alignment\n0,{film},5,1\n", "item,film,quality,alignment\n0,nobody,1,1\n"):
        wrong.write_text(text)
        assert main(["study", "read", str(key), str(wrong)]) == 1
        assert "not the answers to this study" in capsys.readouterr().err
    assert main(["study", "read", str(wrong), str(wrong)]) == 1 and "no key of a study" in capsys.readouterr().err


def test_agreement_is_krippendorffs() -> None:
    assert agreement({"a": [1.0, 1.0], "b": [4.0, 4.0]}) == 1 and agreement({"a": [1.0], "b": [2.0, 2.0]}) is None
    assert agreement({"a": [1.0, 4.0], "b": [4.0, 1.0]}) == pytest.approx(-0.5), "worse than chance"
    # The example of Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section E: 0.849.
    seen = ["1 11", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", " 555", "  11", " 3  "]
    ratings = {unit: [float(value) for value in row if value != " "] for unit, row in enumerate(seen)}
    assert agreement(ratings) == pytest.approx(0.849, abs=5e-4)
