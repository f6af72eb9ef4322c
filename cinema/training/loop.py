"""The training loop: one for every model of the package, with its logs, averages and checkpoints.

All randomness of a step is a function of (seed, step), so the position in the data is the step number and resuming
is exact: on the CPU an interrupted run ends with the same bits as an uninterrupted one.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic.dataclasses
import torch
from accelerate import Accelerator
from jaxtyping import Float
from pydantic import DirectoryPath
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cinema.config import WEIGHTS
from cinema.errors import UserError
from cinema.files import atomic, write_json, write_text
from cinema.progress import Progress, quiet
from cinema.training.config import Stage, TrainConfig

BIAS_RATE = 30.0  # of T5's attention biases, times the rate of the rest; its own optimiser was relative
CHECKPOINTS = "checkpoint-[0-9]*.safetensors"


@pydantic.dataclasses.dataclass(config={"extra": "forbid"})
class Task:
    """What differs between the models: the data, the loss, and how weights are written and looked at.

    Its fields are a config's `options`. `model` is what is trained; `loss` gets it wrapped (precision, accelerate) and
    only calls it. Under half precision its parameters are bfloat16 then: a forward casts its inputs to their dtype.
    """

    seed: int
    init: DirectoryPath | None  #: weights to start from
    shape: dict[str, Any] = field(default_factory=dict, kw_only=True)  #: of a new model, its config's keys

    def __post_init__(self) -> None:
        if self.init and self.shape:
            raise ValueError("'shape' is not an option where `init` gives the model")
        torch.manual_seed(self.seed)
        self.model = self.build()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def load(self, kind: Any, part: str, **where: str) -> Any:
        """The weights of `init`; or a new model, that part of the shipped weights in all but `shape`."""
        if self.init:
            return kind.from_pretrained(self.init, torch_dtype=torch.float32, **where)
        told = {key: value for key, value in kind.load_config(WEIGHTS / part).items() if not key.startswith("_")}
        return kind(**told | self.shape)

    def build(self) -> Any:
        """The model that is trained; also loads what else the task needs."""
        raise NotImplementedError

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Loss of the batch that belongs to this step, and figures to log."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the current weights as a folder that stock diffusers, transformers or open_clip loads."""
        raise NotImplementedError

    def sample(self, path: Path, stage: Stage) -> None:
        """Write a picture that shows what the current weights can do, where there is something to see."""


@dataclass
class Run:
    """A training run in progress: the averaged weights are `ema`, the step to do next is `step`."""

    config: TrainConfig
    task: Task
    out: Path
    model: nn.Module  # the task's, wrapped
    optimizers: list[Any]
    ema: dict[str, Tensor]
    accelerator: Accelerator
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)  # what was logged, a line of log.jsonl each


def run_training(config: TrainConfig, task: Task, out: Path, resume: bool, on_progress: Progress = quiet) -> Run:
    """Train `task` in folder `out`; writes logs, samples, checkpoints and, at the end, `out/weights`.

    With `resume` it goes on from the newest good checkpoint in `out`, or starts if there is none. UserError if `out`
    holds another run, or the loss is not a number any more.
    """
    run = _start(config, task, out, resume)
    clock, since = time.monotonic(), run.step
    while run.step < config.total_steps:
        stage = config.stage_at(run.step)
        figures = _one_step(run, stage)
        run.step += 1
        last = run.step == config.total_steps
        if last or run.step % config.log_every == 0:
            now = time.monotonic()
            figures["steps_per_s"] = (run.step - since) / (now - clock)
            clock, since = now, run.step
            run.log.append({"step": run.step, **{k: round(v, 6) for k, v in figures.items()}})
            _write_log(run)
            run.accelerator.log(figures, run.step)
            on_progress(run.step, config.total_steps, f"loss {figures['loss']:.4f}")
        if run.step % config.sample_every == 0:
            with averaged(run):
                task.sample(out / "samples" / f"{run.step:07d}.png", stage)
        if last or run.step % config.save_every == 0:
            _save_checkpoint(run)
    with averaged(run):
        task.save(out / "weights")
        task.sample(out / "samples" / "final.png", config.stages[-1])
    run.accelerator.end_training()
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
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with="tensorboard", project_dir=out)
    model = task.model.to(accelerator.device)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    run = Run(config, task, out, model, make_optimizers(config, model), ema, accelerator)
    if newest := latest_checkpoint(out):
        if not resume:
            raise UserError(f"{out} holds a run at {newest.name}; add --resume to go on, or choose another folder")
        _load_checkpoint(run, newest)
    write_json(out / "config.json", config.model_dump(mode="json"))
    _write_log(run)
    (out / "samples").mkdir(exist_ok=True)
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": run.step + 1}})
    learner = HalfPrecision(model) if config.precision == "bf16" else model
    run.model, *run.optimizers = accelerator.prepare(learner, *run.optimizers)
    return run


def _write_log(run: Run) -> None:
    write_text(run.out / "log.jsonl", "".join(f"{json.dumps(line)}\n" for line in run.log))


def _one_step(run: Run, stage: Stage) -> dict[str, float]:
    run.model.train()
    torch.manual_seed(hash((run.config.seed, run.step)) % 2**31)  # dropout, if a model has any
    loss, figures = run.task.loss(run.model, stage, run.step)
    value, rate = loss.item(), run.config.rate(run.step)
    if not math.isfinite(value):
        good = latest_checkpoint(run.out)
        raise UserError(
            f"{run.out}: the loss at step {run.step} is {value}; "
            f"the last good checkpoint is {good.name if good else 'none'}: train in another folder at a lower rate"
        )
    run.model.zero_grad()
    run.accelerator.backward(loss)
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.grad_clip)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        optimizer.step()
    with torch.no_grad():
        decay = min(run.config.ema, (1 + run.step) / (10 + run.step))
        own = {k: v for k, v in run.task.model.state_dict().items() if v.is_floating_point()}
        torch._foreach_lerp_([run.ema[k] for k in own], list(own.values()), 1 - decay)
    return {"loss": value, "grad_norm": float(norm), "rate": rate, **figures}


def make_optimizers(config: TrainConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest; groups carry `base_lr`.

    Muon orthogonalises the update of a matrix. It suits the dense matrices and kernels inside blocks; embeddings,
    modulation, norms and the output layer stay with AdamW.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        odd = any(x in name for x in ("norm", "scale_shift", "conv_shortcut"))
        if config.muon_lr and parameter.ndim > 1 and "blocks." in name and not odd:
            parts["dense"].append(_as_matrix(parameter))
        else:
            parts["bias" if "relative_attention_bias" in name else "rest"].append(parameter)
    groups: list[dict[str, Any]] = [{"params": parts["rest"], "lr": config.lr}]
    if parts["bias"]:  # logits that must grow to 5 or so before a head looks at one neighbour
        groups.append({"params": parts["bias"], "lr": BIAS_RATE * config.lr, "weight_decay": 0.0})
    decay: Any = {"weight_decay": config.weight_decay}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=config.betas, fused=True, **decay)]
    if config.muon_lr and parts["dense"]:
        muon = torch.optim.Muon(parts["dense"], config.muon_lr, momentum=0.95, adjust_lr_fn="match_rms_adamw", **decay)
        optimizers.append(muon)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers


def _as_matrix(kernel: nn.Parameter) -> nn.Parameter:
    """The same numbers in memory as a matrix (out, in k k), which gets the gradients, too."""
    matrix = nn.Parameter(kernel.detach().flatten(1))
    kernel.register_post_accumulate_grad_hook(lambda own: setattr(matrix, "grad", own.grad.flatten(1)))
    return matrix


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint in a run's folder that can be read; None if there is none."""
    for path in sorted(out.glob(CHECKPOINTS), reverse=True):
        with suppress(SafetensorError, OSError), safe_open(path, "pt"):
            return path  # one that was cut in half by a crash or a full disk is passed over
    return None


def _save_checkpoint(run: Run) -> None:
    """Write weights, averages, optimiser states and log in one file, complete or absent; remove all but the newest."""
    tensors = {f"model.{k}": v for k, v in run.task.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in run.ema.items()}
    for i, optimizer in enumerate(run.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in state.items()}
    told = {"step": run.step, "log": run.log, "config": run.config.model_dump(mode="json")}
    with atomic(run.out / f"checkpoint-{run.step:07d}.safetensors") as part:
        kept = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(kept, part, {k: json.dumps(v) for k, v in told.items()})
    for old in sorted(run.out.glob(CHECKPOINTS))[: -run.config.keep]:
        old.unlink()


def _load_checkpoint(run: Run, path: Path) -> None:
    """Put a run back to where the checkpoint was written."""
    with safe_open(path, "pt", device=str(run.accelerator.device)) as file:
        told = {k: json.loads(v) for k, v in file.metadata().items()}
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    if told.get("config") != run.config.model_dump(mode="json"):
        raise UserError(f"{run.out} holds a run with another config; choose another folder or remove it")

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    run.step, run.log, run.ema = told["step"], told["log"], under("ema.")
    run.task.model.load_state_dict(under("model."))
    for i, optimizer in enumerate(run.optimizers):
        for j, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter] = under(f"optimizer.{i}.{j}.")
