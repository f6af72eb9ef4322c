import json
from dataclasses import replace
from pathlib import Path

import pytest

from cinema.bench_planner import HEAD, _draw, bench_planner
from cinema.cli import main
from cinema.config import TOY
from cinema.errors import UserError
from cinema.training.keyframes import small_flux

SMALL = replace(TOY.keyframes, height=64, width=128, memory_levels=2, memory_group=2, steps=3)


def test_the_command_prints_seconds_and_ratios(tmp_path: Path, capsys) -> None:
    file = tmp_path / "f.json"
    given = ["--pairs", "1,3", "--width", "64", "--double", "1", "--single", "1", "--json", str(file)]
    assert main(["bench", "planner", *given]) == 0
    told = json.loads(file.read_text())
    assert set(told["seconds"]["naive"]) == set(told["naive / planned"]) == {"1", "3"}
    for count, ratio in told["naive / planned"].items():
        assert ratio == told["seconds"]["naive"][count] / told["seconds"]["planned"][count] > 0
    assert "planned, 3 / 1" in capsys.readouterr().out


def test_what_is_timed_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_flux(1, 1, 1, HEAD, HEAD).eval(), []

    def watched(name: str, what: str) -> None:
        real = getattr(model, name)

        def call(groups, *rest, **more):
            seen.append((what, [(group.latents.shape[1], group.index.tolist()) for group in groups]))
            return real(groups, *rest, **more)

        monkeypatch.setattr(model, name, call)

    watched("forward_pairs", "step")
    watched("encode_context", "context")
    _draw(model, SMALL, 9, naive=True)
    assert seen == [("step", [(8, [0, 1, 2, 3, 4, 5, 6, 7]), (1, [8])])] * 3
    seen.clear()
    _draw(model, SMALL, 9, naive=False)  # two levels of two, one of them the newest
    assert seen == [("context", [(1, [2]), (2, [0, 1])]), *[("step", [(1, [3])])] * 3]


def test_odd_widths_and_no_pairs_are_refused() -> None:
    for width, pairs in ((100, (4,)), (64, (0,)), (64, ())):
        with pytest.raises(UserError, match="give a multiple of 64, and 1 pair or more"):
            bench_planner(SMALL, pairs, width, 1, 1)
