"""The training loop: one for every model of the package, with its logs, averages and checkpoints.

All randomness of a step is a function of (seed, step), so the position in the data is the step number and resuming
is exact: on the CPU an interrupted run ends with the same bits as an uninterrupted one.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cinema.errors import UserError
from cinema.files import atomic, write_json, write_text
from cinema.training.config import Stage, TrainConfig
from cinema.training.optim import make_optimizers

Progress = Callable[[int, int, str], None]


@runtime_checkable
class Task(Protocol):
    """What differs between the models: the data, the loss, and how weights are written and looked at.

    `model` is what is trained; `loss` gets it wrapped (precision, accelerate) and only calls it. Under half precision
    its parameters are bfloat16 during the call, so a forward casts its inputs to its parameters' dtype.
    """

    model: nn.Module

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Loss of the batch that belongs to this step, and figures to log."""
        ...

    def save(self, folder: Path) -> None:
        """Write the current weights as a diffusers or transformers folder."""
        ...

    def sample(self, path: Path, stage: Stage) -> None:
        """Write a picture that shows what the current weights can do."""
        ...


@dataclass
class Run:
    """A training run in progress: the task, its optimisers, the averaged weights and the step to do next."""

    config: TrainConfig
    task: Task
    out: Path
    optimizers: list[torch.optim.Optimizer]
    ema: dict[str, Tensor]
    step: int = 0


def run_training(config: TrainConfig, task: Task, out: Path, resume: bool, on_progress: Progress | None = None) -> Run:
    """Train `task` in folder `out`; writes logs, samples, checkpoints and, at the end, `out/weights`.

    Args:
        resume: go on from the newest good checkpoint in `out`, or start if there is none.

    Raises:
        UserError: `out` holds another run, or the loss is not a number any more.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    task.model.to(accelerator.device)
    run = _start(config, task, out, resume)
    learner = HalfPrecision(task.model) if config.precision == "bf16" else task.model
    model, *run.optimizers = accelerator.prepare(learner, *run.optimizers)
    with _log(out, run.step) as log:
        _train(run, model, accelerator, log, on_progress)
    with averaged(run):
        task.save(out / "weights")
        task.sample(out / "samples" / "final.png", config.stages[-1])
    return run


class HalfPrecision(nn.Module):
    """Computes in bfloat16 with float32 master weights: parameters are cast once per call, gradients flow back.

    Unlike autocast nothing between the matrix products is float32, which on a CPU halves the time of a step; a
    model that needs float32 somewhere (a loss, a time embedding) asks for it by name.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its parameters in bfloat16."""
        half = {k: v.to(torch.bfloat16) for k, v in self.module.named_parameters()}
        return torch.func.functional_call(self.module, half, args, kwargs)


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """Within this block the task's model holds the averaged weights."""
    model = run.task.model
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(run.ema)
    model.eval()
    try:
        yield
    finally:
        model.load_state_dict(own)
        model.train()


def _start(config: TrainConfig, task: Task, out: Path, resume: bool) -> Run:
    told, kept = config.model_dump(mode="json"), out / "config.json"
    if kept.exists() and _read_json(kept.read_text(), told) != told:
        raise UserError(f"{out} holds a run with another config; choose another folder or remove it")
    newest = latest_checkpoint(out)
    if newest and not resume:
        raise UserError(f"{out} holds a run at {newest.name}; add --resume to go on, or choose another folder")
    write_json(kept, told)
    (out / "samples").mkdir(exist_ok=True)
    ema = {k: v.detach().clone() for k, v in task.model.state_dict().items()}
    run = Run(config, task, out, make_optimizers(config, task.model), ema)
    if newest:
        _load_checkpoint(run, newest)
    return run


def _train(
    run: Run,
    model: nn.Module,
    accelerator: Accelerator,
    log: Callable[[int, dict[str, float]], None],
    on_progress: Progress | None,
) -> None:
    config, clock, since = run.config, time.monotonic(), run.step
    while run.step < config.total_steps:
        stage = config.stage_at(run.step)
        figures = _one_step(run, model, stage, accelerator)
        run.step += 1
        last = run.step == config.total_steps
        if last or run.step % config.log_every == 0:
            now = time.monotonic()
            figures["steps_per_s"] = (run.step - since) / (now - clock)
            clock, since = now, run.step
            log(run.step, figures)
            if on_progress:
                on_progress(run.step, config.total_steps, f"loss {figures['loss']:.4f}")
        if run.step % config.sample_every == 0:
            with averaged(run):
                run.task.sample(run.out / "samples" / f"{run.step:07d}.png", stage)
        if last or run.step % config.save_every == 0:
            _save_checkpoint(run)


def _one_step(run: Run, model: nn.Module, stage: Stage, accelerator: Accelerator) -> dict[str, float]:
    model.train()
    torch.manual_seed(hash((run.config.seed, run.step)) % 2**31)  # dropout, if a model has any
    loss, figures = run.task.loss(model, stage, run.step)
    value, rate = loss.item(), run.config.rate(run.step)
    if not math.isfinite(value):
        good = latest_checkpoint(run.out)
        raise UserError(
            f"{run.out}: the loss at step {run.step} is {value}; "
            f"the last good checkpoint is {good.name if good else 'none'}: lower the learning rate and resume from it"
        )
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), run.config.grad_clip)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        optimizer.step()
    _average(run)
    return {"loss": value, "grad_norm": float(norm), "rate": rate, **figures}


@torch.no_grad()
def _average(run: Run) -> None:
    decay = min(run.config.ema, (1 + run.step) / (10 + run.step))
    own = {k: v for k, v in run.task.model.state_dict().items() if v.is_floating_point()}
    torch._foreach_lerp_([run.ema[k] for k in own], list(own.values()), 1 - decay)


# --- checkpoints and logs -------------------------------------------------------------------------------------


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint in a run's folder that can be read; None if there is none."""
    for path in reversed(_checkpoints(out)):
        try:
            with safe_open(path, "pt") as file:
                file.metadata()["step"]
            return path
        except (SafetensorError, OSError, KeyError, TypeError):
            continue  # cut in half by a crash or a full disk: the one before it is good
    return None


def _checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob(f"checkpoint-{'[0-9]' * 7}.safetensors"))


def _save_checkpoint(run: Run) -> None:
    """Write weights, averages and optimiser states in one file, complete or absent; remove all but the newest."""
    tensors = {f"model.{k}": v for k, v in run.task.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in run.ema.items()}
    for i, optimizer in enumerate(run.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in state.items()}
    with atomic(run.out / f"checkpoint-{run.step:07d}.safetensors") as part:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, part, {"step": str(run.step)})
    for old in _checkpoints(run.out)[: -run.config.keep]:
        old.unlink()


def _load_checkpoint(run: Run, path: Path) -> None:
    """Put a run back to where the checkpoint was written."""
    with safe_open(path, "pt") as file:
        run.step = int(file.metadata()["step"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    run.task.model.load_state_dict(_under(tensors, "model."))
    for name, average in _under(tensors, "ema.").items():
        run.ema[name].copy_(average)
    for i, optimizer in enumerate(run.optimizers):
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in _under(tensors, f"optimizer.{i}.").items():
            index, name = key.split(".", 1)
            state[int(index)][name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _read_json(text: str, otherwise: dict[str, Any]) -> dict[str, Any]:
    """What a file or a line says; `otherwise` if it was cut in half by a crash."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return otherwise


@contextmanager
def _log(out: Path, step: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Logs one step's figures, as JSON lines and in TensorBoard; lines after `step` are dropped first."""
    from torch.utils.tensorboard import SummaryWriter

    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _read_json(line, {"step": step + 1})["step"] <= step]
    write_text(path, "".join(f"{line}\n" for line in kept))
    with path.open("a", buffering=1) as file, SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) as board:

        def write(step: int, figures: dict[str, float]) -> None:
            file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in figures.items()}}) + "\n")
            for name, value in figures.items():
                board.add_scalar(name, value, step)

        yield write
