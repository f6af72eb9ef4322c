"""The claims ledger: its results are of the shipped weights, its verdicts follow from intervals, its commands exist."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from cinema.cli import app

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import ledger  # noqa: E402

CLAIMS = ledger.settings()["claims"]
NAMES = list(ledger.settings()["results"])
FIGURES = {
    "good": {"mean": 0.8, "ci95": [0.7, 0.9], "gain ci95": [0.1, 0.3]},
    "flat": 0.5,
    "ci95": {"flat": [0.4, 0.6]},
    "bare": 0.25,
    "rows": [{"pairs": 8, "memory": "full", "tokens": 10}, {"pairs": 48, "memory": "full", "tokens": 20}],
}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"x": {"figures": FIGURES}, "list": {"figures": FIGURES["rows"]}}
    monkeypatch.setattr(ledger, "result", results.__getitem__)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_of_the_weights_that_are_shipped(name: str) -> None:
    assert ledger.fresh(name, ledger.RESULTS), f"book/results/{name}.json: of other weights; run make ledger"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one(name: str) -> None:
    of = ledger.settings()["results"][name]
    command: Any = typer.main.get_command(app)
    words = shlex.split(f"{of['command']} {of.get('small', '')}")
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("cinema", words)


def test_every_claim_is_judged_and_its_tests_are_there() -> None:
    for claim in CLAIMS:
        row = ledger.ledger_row(claim)
        assert row.count("| ") >= 5 and "[" not in row, row
        assert {claim["claim"], claim["source"], claim["paper"]} - {""}
        if "proved" in claim:
            path, test = claim["proved"].split("::")
            assert f"def {test}(" in (ROOT / path).read_text()
    judged = {ledger.verdict(claim) for claim in CLAIMS}
    assert judged <= {*ledger.BADGES, "cannot be tested here"} and len(CLAIMS) > 15


def test_every_claim_stands_on_the_page_once() -> None:
    page = (ledger.BOOK / "ledger.md").read_text()
    groups = list(dict.fromkeys(claim["group"] for claim in CLAIMS))
    assert [page.count(f"```{{ledger}} {group}\n") for group in groups] == [1] * len(groups)


def test_figures_bring_their_intervals(made_up: None) -> None:
    assert ledger.measured("x/good") == (0.8, 0.7, 0.9)
    assert ledger.measured("x/flat") == (0.5, 0.4, 0.6)
    assert ledger.measured("x/bare") == (0.25, 0.25, 0.25)
    assert ledger.measured("x/good/gain")[1:] == (0.1, 0.3)
    assert ledger.measured("x/rows/48 full/tokens").mean == 20
    assert ledger.fill("so [x/good], [x/bare:.1%] or [x/flat]") == "so 0.80 (0.70–0.90), 25.0% or 0.50 (0.40–0.60)"


@pytest.mark.parametrize(
    ("claim", "judged"),
    [
        ({"of": "x/good", "above": 0.6}, "holds"),
        ({"of": "x/good", "above": 0.95}, "does not hold"),
        ({"of": "x/good", "above": 0.75}, "not shown"),
        ({"of": "x/good", "below": 0.95}, "holds"),
        ({"of": "x/good", "below": 0.75}, "not shown"),
        ({"of": "x/good", "below": 0.6}, "does not hold"),
        ({"ratio": ["x/flat", "x/good"], "above": 0.4}, "holds"),  # 0.4 / 0.9 at worst
        ({"ratio": ["x/flat", "x/good"], "above": 0.5}, "not shown"),
        ({"difference": ["x/good", "x/flat"], "above": 0}, "holds"),
        ({"difference": ["x/good", "x/flat"], "above": 0.2}, "not shown"),
        ({"equals": ["list/tokens", [10, 20]]}, "holds"),
        ({"equals": ["list/tokens", [10, 21]]}, "does not hold"),
        ({"untested": "too dear"}, "cannot be tested here"),
        ({"proved": "tests/x.py::test_x"}, "proved"),
    ],
)
def test_a_verdict_needs_the_whole_interval(made_up: None, claim: dict[str, Any], judged: str) -> None:
    assert ledger.verdict(claim) == judged


def test_measuring_keeps_what_made_it(tmp_path: Path) -> None:
    assert not ledger.fresh("coverage", tmp_path)
    ledger.measure("coverage", tmp_path, small=True)
    kept = json.loads((tmp_path / "coverage.json").read_text())
    assert kept["command"].endswith("--stories 2") and kept["figures"]["stories"] == 2
    assert {*kept["weights"]} == {"keyframes", "towers"} and kept["versions"]["torch"] and kept["seconds"] > 0
    assert ledger.fresh("coverage", tmp_path)
    path = tmp_path / "coverage.json"
    path.write_text(path.read_text().replace(kept["weights"]["towers"], "other"))
    assert not ledger.fresh("coverage", tmp_path)
