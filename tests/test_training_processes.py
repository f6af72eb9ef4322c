"""Two processes train as one does: each with the whole model, and each with a half of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from diffusers import LTXVideoTransformer3DModel
from safetensors.torch import load_file

from cinema.config import TOY
from cinema.training import train
from cinema.training.keyframes import KeyframeTask
from cinema.transformer import InterleavedFluxTransformer

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SHAPE = {"double": 1, "single": 2, "heads": 2, "head_dim": 24, "text": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, the base that it starts from, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("processes")
    parts = tiny.toy_text(folder) | {"vae": Path(TOY.keyframes.weights) / "vae"}
    task = KeyframeTask(0, None, **parts, cache=folder / "cache", movies=2, shots=3, shape=SHAPE)
    for name, parameter in task.model.named_parameters():
        if "norm" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # zero in a new model: nothing before it would learn
    task.save(folder / "base")
    options = {"cache": str(folder / "cache"), "movies": 2, "shots": 4, "recall": 0.1}
    stages = [{"steps": 4, "batch": 4, "pairs": 3}]
    told = {"task": "keyframes", "init": str(folder / "base"), "options": options, "stages": stages, "precision": "no"}
    told |= {"warmup": 0, "save_every": 2, "sample_every": 99}
    (folder / "run.yaml").write_text(yaml.safe_dump(told))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyframeTask, "sample", lambda *_: None)
        train(folder / "run.yaml", folder / "one")
    return folder


def trained_alike(folder: Path, name: str) -> bool:
    """Whether a run's last checkpoint has the weights and averages of the one process, but for rounding."""
    one, own, start = (
        load_file(folder / run / f"checkpoint-000000{step}.safetensors")
        for run, step in (("one", 4), (name, 4), ("one", 2))
    )
    moved = max((one[k] - start[k]).abs().max().item() for k in one if k.startswith("model."))
    apart = max((one[k] - own[k]).abs().max().item() for k in one if not k.startswith("optimizer."))
    assert one.keys() == own.keys() and moved > 1e-4
    return apart < 0.02 * moved  # sums in another order; Adam's first steps make much of gradients near zero


@pytest.mark.parametrize(
    ("name", "model", "shape"),
    [
        ("fsdp2.yaml", InterleavedFluxTransformer, {"num_layers": 1, "num_single_layers": 1}),
        ("fsdp2-ltx.yaml", LTXVideoTransformer3DModel, {"num_layers": 1}),
    ],
)
def test_what_is_shared_block_by_block_are_blocks_of_the_model(name: str, model: type, shape: dict[str, int]) -> None:
    settings = yaml.safe_load((Path(__file__).parents[1] / "configs" / "accelerate" / name).read_text())
    with torch.device("meta"):
        blocks = {type(module).__name__ for module in model(**shape).modules()}
    assert {*settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")} <= blocks


def launch(*arguments: object, **environment: str) -> None:
    command = [*LAUNCH, *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_as_one(folder: Path) -> None:
    launch("-m", "cinema.cli", "train", folder / "run.yaml", "-o", folder / "two")
    assert trained_alike(folder, "two")
    assert "2 processes" in (folder / "two" / "weights" / "README.md").read_text()


def test_two_halves_of_a_model_train_and_resume_as_one(folder: Path) -> None:
    settings = yaml.safe_load((Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    told = {k.upper(): str(v).lower() if isinstance(v, bool) else str(v) for k, v in settings["fsdp_config"].items()}
    told["FSDP_TRANSFORMER_CLS_TO_WRAP"] = told.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP")
    told |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    passes = yaml.safe_load((folder / "run.yaml").read_text()) | {"accumulate": 2}
    (folder / "passes.yaml").write_text(yaml.safe_dump(passes))
    launch(Path(__file__).with_name("sharded.py"), folder / "passes.yaml", folder / "shards", **told)
    assert trained_alike(folder, "shards")
    (folder / "shards" / "checkpoint-0000004.safetensors").unlink()
    launch(Path(__file__).with_name("sharded.py"), folder / "passes.yaml", folder / "shards", **told)
    assert trained_alike(folder, "shards") and (folder / "shards" / "weights" / "model_index.json").is_file()
