import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cinema.bench_planner import bench_training, dense_pairs, most_allocated, random_flux, random_pairs
from cinema.cli import main
from cinema.config import TOY
from cinema.goldenmem import Layout

CPU = torch.device("cpu")
SMALL = replace(TOY.keyframes, height=64, width=128, memory_levels=2, memory_group=2)


def test_three_forms_are_timed_and_their_peaks_told() -> None:
    told = bench_training(SMALL, (1, 6), 64, 1, 1)
    forms = ("mask", "fold", "goldenmem")
    assert list(told["forms"]) == [f"{n} pairs, {form}" for n in (1, 6) for form in forms] and told["mask"] == "causal"
    mask, fold, golden = (told["forms"][f"6 pairs, {form}"] for form in forms)
    assert fold["mask / it"] == mask["seconds"] / fold["seconds"] and min(fold.values()) > 0
    assert 0 < golden["peak bytes"] < fold["peak bytes"] < mask["peak bytes"]
    assert json.loads(json.dumps(told)) == told


def test_the_command_prints_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.json"
    given = ["--pairs", "2", "--width", "64", "--double", "1", "--single", "1", "--json", str(file)]
    assert main(["bench", "training", *given]) == 0
    assert len(json.loads(file.read_text())["forms"]) == 3 and "mask / it" in capsys.readouterr().out


def test_the_dense_form_computes_what_the_folds_compute() -> None:
    model = random_flux(64, 1, 2, (3,)).float()
    for parameter in model.parameters():  # modulations and the output begin at zero
        torch.nn.init.normal_(parameter, std=0.1)
    groups = random_pairs(model, Layout(3, 4, 2, 2), 5)
    for causal in (False, True):
        folds = {
            int(k): out[:, j]
            for g, out in zip(groups, model.forward_pairs(groups, causal), strict=True)
            for j, k in enumerate(g.index)
        }
        for k, dense in enumerate(dense_pairs(model, groups, causal)):
            assert torch.allclose(dense, folds[k], atol=1e-5)


def test_the_most_allocated_is_of_the_run_alone() -> None:
    held = torch.zeros(1_000_000)
    assert most_allocated(lambda: (held + 1).sum(), CPU) in range(4_000_000, 4_100_000)
    assert most_allocated(lambda: None, CPU) == 0
