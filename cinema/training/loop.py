"""The training loop: one for every model of the package.

All randomness of a step is a function of (seed, step), so the position in the data is the step number and resuming
is exact: on the CPU an interrupted run ends with the same bits as an uninterrupted one.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from cinema.errors import UserError
from cinema.files import write_json, write_text
from cinema.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
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
    run.ema = {k: v.to(accelerator.device) for k, v in run.ema.items()}
    learner = HalfPrecision(task.model) if config.precision == "bf16" else task.model
    model, *run.optimizers = accelerator.prepare(learner, *run.optimizers)
    with closing(_Log(out, run.step)) as log:
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


class averaged:
    """Within this block the task's model holds the averaged weights."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.own: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        state = self.run.task.model.state_dict()
        self.own = {k: v.clone() for k, v in state.items()}
        self.run.task.model.load_state_dict(self.run.ema)
        self.run.task.model.eval()

    def __exit__(self, *_: object) -> None:
        self.run.task.model.load_state_dict(self.own)
        self.run.task.model.train()


def _start(config: TrainConfig, task: Task, out: Path, resume: bool) -> Run:
    out.mkdir(parents=True, exist_ok=True)
    told, kept = config.model_dump(mode="json"), out / "config.json"
    if _read_json(kept.read_text() if kept.exists() else "", told) != told:
        raise UserError(f"{out} holds a run with another config; choose another folder or remove it")
    newest = latest_checkpoint(out)
    if newest and not resume:
        raise UserError(f"{out} holds a run at {newest.name}; add --resume to go on, or choose another folder")
    write_json(kept, told)
    ema = {k: v.detach().clone() for k, v in task.model.state_dict().items()}
    run = Run(config, task, out, make_optimizers(config, task.model), ema)
    if newest:
        load_checkpoint(run, newest)
    return run


def _train(run: Run, model: nn.Module, accelerator: Accelerator, log: "_Log", on_progress: Progress | None) -> None:
    config, out, clock, since = run.config, run.out, time.monotonic(), run.step
    while run.step < config.total_steps:
        stage = config.stage_at(run.step)
        figures = _one_step(run, model, stage, accelerator)
        run.step += 1
        if run.step % config.log_every == 0 or run.step == config.total_steps:
            now = time.monotonic()
            figures["steps_per_s"] = (run.step - since) / (now - clock)
            clock, since = now, run.step
            log.write(run.step, figures)
            if on_progress:
                on_progress(run.step, config.total_steps, f"loss {figures['loss']:.4f}")
        if run.step % config.sample_every == 0:
            with averaged(run):
                run.task.sample(out / "samples" / f"{run.step:07d}.png", stage)
        if run.step % config.save_every == 0 or run.step == config.total_steps:
            save_checkpoint(run, out, config.keep)


def _one_step(run: Run, model: nn.Module, stage: Stage, accelerator: Accelerator) -> dict[str, float]:
    config = run.config
    model.train()
    torch.manual_seed(hash((config.seed, run.step)) % 2**31)  # dropout, if a model has any
    loss, figures = run.task.loss(model, stage, run.step)
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        good = latest_checkpoint(run.out)
        raise UserError(
            f"{run.out}: the loss at step {run.step} is {value}; "
            f"the last good checkpoint is {good.name if good else 'none'}: lower the learning rate and resume from it"
        )
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), config.grad_clip)
    rate = config.rate(run.step)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        optimizer.step()
    _average(run)
    return {"loss": value, "grad_norm": float(norm), "rate": rate, **figures}


@torch.no_grad()
def _average(run: Run) -> None:
    decay = min(run.config.ema, (1 + run.step) / (10 + run.step))
    own = run.task.model.state_dict()
    floats = [k for k, v in own.items() if v.is_floating_point()]
    torch._foreach_lerp_([run.ema[k] for k in floats], [own[k] for k in floats], 1 - decay)


def _read_json(text: str, otherwise: dict[str, Any]) -> dict[str, Any]:
    """What a file or a line says; `otherwise` if it was cut in half by a crash."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return otherwise


class _Log:
    """JSON lines and TensorBoard side by side; lines after the resumed step are dropped first."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = out / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _read_json(line, {"step": step + 1})["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Log one step's figures."""
        self.file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in figures.items()}}) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        self.board.close()
