"""Checkpoints: one safetensors file each, complete or absent, newest good one found by itself."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cinema.files import atomic

if TYPE_CHECKING:
    from cinema.training.loop import Run

NAME = re.compile(r"checkpoint-(\d{7})\.safetensors")


def save_checkpoint(run: "Run", out: Path, keep: int) -> Path:
    """Write weights, averages and optimiser states of a run; remove all but the `keep` newest."""
    path = out / f"checkpoint-{run.step:07d}.safetensors"
    tensors = {f"model.{k}": v for k, v in run.task.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in run.ema.items()}
    for i, optimizer in enumerate(run.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in state.items()}
    with atomic(path) as part:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, part, {"step": str(run.step)})
    for old in _all(out)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(run: "Run", path: Path) -> None:
    """Put a run back to where the checkpoint was written."""
    with safe_open(path, "pt") as file:
        run.step = int(file.metadata()["step"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    run.task.model.load_state_dict(_under(tensors, "model."))
    run.ema = _under(tensors, "ema.")
    for i, optimizer in enumerate(run.optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(tensors, f"optimizer.{i}.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint in a run's folder that can be read; None if there is none."""
    for path in reversed(_all(out)):
        try:
            with safe_open(path, "pt") as file:
                file.metadata()["step"]
            return path
        except (SafetensorError, OSError, KeyError, TypeError):
            continue  # cut in half by a crash or a full disk: the one before it is good
    return None


def _all(out: Path) -> list[Path]:
    return sorted(p for p in out.glob("checkpoint-*.safetensors") if NAME.fullmatch(p.name))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
