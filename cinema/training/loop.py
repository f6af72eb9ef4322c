"""The training loop: one for every model of the package, with its logs, averages and checkpoints.

All randomness of a step is a function of (seed, step), so the position in the data is the step number and resuming
is exact: on the CPU an interrupted run ends with the same bits as an uninterrupted one.
"""

import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pydantic.dataclasses
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from huggingface_hub import ModelCardData
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from cinema.config import WEIGHTS
from cinema.errors import UserError
from cinema.files import atomic, sweep, write_json, write_text
from cinema.progress import Progress, quiet
from cinema.training.config import Stage, TrainConfig

BIAS_RATE = 30.0  # of T5's attention biases, times the rate of the rest; its own optimiser was relative
CHECKPOINTS = "checkpoint-[0-9]*.safetensors"
PROGRESS = ("step", "log", "recent", "figures")  # of a run, kept in its checkpoints
WATCHING = ("log_every", "save_every", "sample_every", "keep", "tracker")  # may change when a run goes on
NUMBER = "#"  # ends the name of a state that is no tensor
EXPLODED = 30.0  # times the recent mean: a loss that high is not of a hard batch
CARD = """---
{facts}
---

# {name}

{about} Trained by `cinema train`, {step:,} of {total:,} steps, {hours:.1f} hours on {machine}.

- **Data**: {data}
- **Base**: {base}
- **Intended use**: learning how short movies are generated, and research on it
- **Limits**: only what the data shows. Nothing here was checked for people, places or events outside of it.
- **Licence**: {licence}

## Last figures

{figures}

## Configuration

```yaml
{config}```
"""


@dataclass(frozen=True)
class At:
    """Where a run is: all that a batch depends on besides the seed."""

    step: int
    position: int  #: windows, frames or whatever a sample is, in all steps before
    count: int  #: samples of this step
    part: int = 0  #: which part of them this process takes, in this pass
    parts: int = 1

    @property
    def all(self) -> range:
        """Positions of all samples of the step."""
        return range(self.position, self.position + self.count)

    @property
    def own(self) -> range:
        """Positions of this part's samples."""
        size = self.count // self.parts
        return range(self.position + self.part * size, self.position + (self.part + 1) * size)


@pydantic.dataclasses.dataclass(config={"extra": "forbid"})
class Task:
    """What differs between the models: the data, the loss, and how weights are written and looked at.

    Its fields are a config's `options`. `model` is what is trained, as far as it requires gradients; `loss` gets it
    wrapped (precision, accelerate) and only calls it. Under half precision its parameters are bfloat16 then: a forward
    casts its inputs to their dtype.
    """

    seed: int
    init: str | None  #: weights to start from
    shape: dict[str, Any] = field(default_factory=dict, kw_only=True)  #: of a new model, its config's keys
    tell: Any = field(default=quiet, kw_only=True, repr=False)  #: not an option: hears how far the data is prepared

    def __post_init__(self) -> None:
        if self.init and self.shape:
            raise ValueError("'shape' is not an option where `init` gives the model")
        torch.manual_seed(self.seed)
        self.model = self.build()

    @classmethod
    def needed_bytes(cls, config: TrainConfig, processes: int = 1, sharded: bool = False) -> int:
        """Memory that each of so many processes needs at least, which may share the weights; 0 where nobody knows."""
        return 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def load(self, kind: Any, part: str, **where: str) -> Any:
        """The weights of `init`; or a new model, that part of the shipped weights in all but `shape`."""
        if self.init:
            return kind.from_pretrained(self.init, torch_dtype=torch.float32, **where)
        config = getattr(kind, "config_class", None)  # of transformers' models; diffusers' take the numbers themselves
        return kind(config(**self.shaped(part))) if config else kind(**self.shaped(part))

    def shaped(self, part: str) -> dict[str, Any]:
        """The configuration of that part of the shipped weights in all but `shape`; ValueError for an unknown key."""
        told = json.loads((WEIGHTS / part / "config.json").read_text())
        if unknown := {*self.shape} - {*told}:
            raise ValueError(f"'shape' has no {', '.join(sorted(unknown))}; it may have {', '.join(sorted(told))}")
        saved = ("dtype", "architectures")  # as which model, in which precision
        return {k: v for k, v in told.items() if k[0] != "_" and k not in saved} | self.shape

    def build(self) -> Any:
        """The model that is trained; also loads what else the task needs."""
        raise NotImplementedError

    @property
    def data_name(self) -> str:
        """What tells the data from other data; a run goes on only on the same."""
        return ""

    def check(self, stage: Stage) -> None:
        """UserError or ValueError if the data has no batch for this stage."""

    def batch(self, stage: Stage, at: At) -> Any:
        """What `loss` is given: a function of the seed and `at`, made beside the step before. Here, the step's number.

        UserError where a step cannot be split into parts.
        """
        if at.parts > 1:
            raise UserError(f"{type(self).__name__} trains in one process and without `accumulate`; leave both away")
        return at.step

    def loss(self, model: nn.Module, stage: Stage, batch: Any) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Loss of a batch, so that the mean over a step's parts is the step's, and figures to log, NaN for none."""
        raise NotImplementedError

    def ids(self, stage: Stage, at: At) -> str:
        """What a batch holds, for a message that something is wrong with it."""
        return f"samples {at.own.start} to {at.own.stop - 1}"

    def save(self, folder: Path) -> None:
        """Write the current weights as a folder that stock diffusers, transformers or open_clip loads."""
        raise NotImplementedError

    def card(self) -> dict[str, str]:
        """What a model card says: `about` the model, and of its `data`."""
        about = f"A part of Captain Cinema: {type(self).__name__.removesuffix('Task').lower()}."
        return {"about": about, "data": "the toy world, drawn by cinema.toyworld"}

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
    recent: float | None = None  # mean of the losses of the last steps
    figures: dict[str, list[float]] = field(default_factory=dict)  # of the steps since the last line of the log

    @property
    def main(self) -> bool:
        """True for the one process that writes."""
        return self.accelerator.is_main_process

    @property
    def sharded(self) -> bool:
        """True if processes share the weights, each holding a part of them."""
        return any(isinstance(value, DTensor) for value in self.ema.values())


def run_training(config: TrainConfig, task: Task, out: Path, resume: bool, on_progress: Progress = quiet) -> Run:
    """Train `task` in folder `out`; writes logs, samples, checkpoints and, at the end, `out/weights`.

    With `resume` it goes on from the newest good checkpoint in `out`, or starts if there is none. Several processes,
    as ``accelerate launch`` starts them, take a part of every batch each. UserError if `out` holds another run, or the
    loss is not a number any more or explodes.
    """
    run = start_run(config, task, out, resume)
    clock, since = time.monotonic(), run.step
    with batches_of(run) as batches:
        while run.step < config.total_steps:
            stage = config.stage_at(run.step)
            for name, value in one_step(run, stage, next(batches)).items():
                run.figures.setdefault(name, []).extend([value] * math.isfinite(value))
            run.step += 1
            last = run.step == config.total_steps
            if last or run.step % config.log_every == 0:
                now = time.monotonic()
                told = {name: sum(values) / len(values) for name, values in run.figures.items() if values}
                told["seconds"], told["samples_per_s"] = now - clock, stage.batch * (run.step - since) / (now - clock)
                told["pairs_per_s"] = stage.pairs * told["samples_per_s"]
                clock, since, run.figures = now, run.step, {}
                run.log.append({"step": run.step, **{k: round(v, 6) for k, v in told.items()}})
                run.accelerator.log(told, run.step)
                on_progress(run.step, config.total_steps, f"loss {told['loss']:.4f}")
                _write_log(run)
            if last or run.step % config.save_every == 0:
                _save_checkpoint(run)
            if config.sample_every and run.step % config.sample_every == 0:
                with averaged(run) as final:
                    if run.main:
                        final.sample(out / "samples" / f"{run.step:07d}.png", stage)
    with averaged(run) as final:
        if run.main:
            final.save(out / "weights")
            write_card(run, out / "weights")
            if config.sample_every:
                final.sample(out / "samples" / "final.png", config.stages[-1])
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return run


@contextmanager
def batches_of(run: Run) -> Iterator[Iterator[list[Any]]]:
    """The parts of each step's batch that this process takes; the next step's are made beside this one's work."""
    config, accelerator = run.config, run.accelerator

    def make(step: int) -> list[Any]:
        stage, parts = config.stage_at(step), accelerator.num_processes * config.accumulate
        at = At(step, config.position(step), stage.batch, parts=parts)
        first = accelerator.process_index * config.accumulate
        return [run.task.batch(stage, replace(at, part=first + i)) for i in range(config.accumulate)]

    with ThreadPoolExecutor(1) as beside:
        coming = (beside.submit(make, step) for step in range(run.step, config.total_steps))
        yield (now.result() for now, _next in pairwise(chain(coming, [None])) if now)


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
        half = {k: v.to(torch.bfloat16) for k, v in self.module.named_parameters() if v.dtype == torch.float32}
        return torch.func.functional_call(self.module, half, args, kwargs)


@contextmanager
def averaged(run: Run) -> Iterator[Task]:
    """A task whose model holds the averaged weights: the run's own within this block; a whole one of sharded weights.

    All processes have to come here; only the main one's is to be used.
    """
    model = run.task.model
    if run.sharded:
        state, task = whole(run, run.ema), replace(run.task) if run.main else run.task
        if run.main:
            task.model.load_state_dict(state, strict=False)
            task.model.to(run.accelerator.device, torch.bfloat16)
        yield task
        return
    own = {k: v.clone() for k, v in trained(model).items()}
    model.load_state_dict(run.ema, strict=False)
    model.eval()
    try:
        yield run.task
    finally:
        model.load_state_dict(own, strict=False)
        model.train()


def whole(run: Run, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the main process's CPU, nothing on the others; takes all of them, as each may hold a part."""
    kept = dict[str, Tensor]()
    for name, value in tensors.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if run.main:
            kept[name] = value.detach().to("cpu", copy=True).contiguous()
    return kept


def _shared(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is shared among processes, if it is and this has its shape."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A model's state without what is frozen."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name in names}


def start_run(config: TrainConfig, task: Task, out: Path, resume: bool) -> Run:
    """A run in a folder, at its beginning or at its newest checkpoint; errors as in `run_training`."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=config.tracker, project_dir=out)
    for number, stage in enumerate(config.stages, 1):
        try:
            task.check(stage)
            if stage.batch % (accelerator.num_processes * config.accumulate):
                among = f"{accelerator.num_processes} processes and {config.accumulate} passes"
                raise ValueError(f"a batch of {stage.batch} cannot be split evenly among {among}")
        except (UserError, ValueError) as error:
            raise UserError(f"stage {number}: {error}; correct the config") from None
    half = config.precision == "bf16"
    if plugin := getattr(accelerator.state, "fsdp_plugin", None):  # noise levels stay in float32, and so do sums
        kind = torch.bfloat16 if half else None
        plugin.mixed_precision_policy = MixedPrecisionPolicy(kind, torch.float32, cast_forward_inputs=False)
    accelerator.wait_for_everyone()  # each may have made a part of the task's data
    model = task.model.to(accelerator.device)
    sharded = accelerator.distributed_type == DistributedType.FSDP  # which casts by itself
    learner = HalfPrecision(model) if half and not sharded else model
    learner, *optimizers = accelerator.prepare(learner, *make_optimizers(config, model))
    ema = {k: v.detach().clone() for k, v in trained(model).items()}
    run = Run(config, task, out, learner, optimizers, ema, accelerator)
    if newest := latest_checkpoint(out):
        if not resume:
            raise UserError(f"{out} holds a run at {newest.name}; add --resume to go on, or choose another folder")
        _load_checkpoint(run, newest)
        for damaged in (path for path in out.glob(CHECKPOINTS) if path > newest and run.main):
            damaged.unlink()
    _write_log(run)
    if run.main:
        sweep(out)
        write_json(out / "config.json", config.model_dump(mode="json"))
        (out / "samples").mkdir(exist_ok=True)
    place = {"tensorboard": "tensorboard", "wandb": "captain-cinema"}[config.tracker]  # a folder, or a project
    accelerator.init_trackers(place, init_kwargs={"tensorboard": {"purge_step": run.step + 1}})
    if run.main and not accelerator.trackers:
        raise UserError(f"{config.tracker} is not installed; run `pip install {config.tracker}`")
    return run


def _write_log(run: Run) -> None:
    if run.main:
        write_text(run.out / "log.jsonl", "".join(f"{json.dumps(line)}\n" for line in run.log))


def one_step(run: Run, stage: Stage, batches: list[Any]) -> dict[str, float]:
    """Train on the parts of a step's batch; gives its figures. The caller counts the step."""
    run.model.train()
    torch.manual_seed(hash((run.config.seed, run.step)) % 2**31)  # dropout, if a model has any
    run.model.zero_grad()
    parts = list[dict[str, Tensor]]()
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        alone = not last and not run.sharded  # each process would hold the whole gradient of shared weights
        with run.accelerator.no_sync(run.model) if alone else nullcontext():
            loss, figures = run.task.loss(run.model, stage, batch)
            run.accelerator.backward(loss / len(batches))
        parts.append({"loss": loss.detach(), **figures})
    names = sorted(parts[0])
    values = torch.tensor([[float(part[name]) for name in names] for part in parts], dtype=torch.float64)
    values = run.accelerator.gather(values.to(run.accelerator.device))
    told = dict(zip(names, values.nanmean(0).tolist(), strict=True))
    told["loss"] = values[:, names.index("loss")].mean().item()  # which has to be a number in all parts
    told["grad_norm"] = float(run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.grad_clip))
    told["rate"] = rate = run.config.rate(run.step)
    _check(run, stage, told)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        optimizer.step()
    with torch.no_grad():
        decay = min(run.config.ema, (1 + run.step) / (10 + run.step))
        own = {k: v for k, v in trained(run.task.model).items() if v.is_floating_point()}
        torch._foreach_lerp_([run.ema[k] for k in own], list(own.values()), 1 - decay)
    return told


def _check(run: Run, stage: Stage, told: dict[str, float]) -> None:
    """UserError if the loss or its gradient is not a number any more, or far above the last ones."""
    wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(told[name])]
    if not wrong and run.recent is not None and told["loss"] > EXPLODED * run.recent:
        wrong = ["loss"]
    run.recent = told["loss"] if run.recent is None else 0.95 * run.recent + 0.05 * told["loss"]
    if wrong:
        good, at = latest_checkpoint(run.out), At(run.step, run.config.position(run.step), stage.batch)
        what = f"the {wrong[0].replace('grad_norm', 'gradient')} at step {run.step} is {told[wrong[0]]:g}"
        raise UserError(
            f"{run.out}: {what} ({run.task.ids(stage, at)}); "
            f"the last good checkpoint is {good.name if good else 'none'}: train in another folder at a lower rate"
        )


def make_optimizers(config: TrainConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest; groups carry `base_lr`.

    Muon orthogonalises the update of a matrix. It suits the dense matrices and kernels inside blocks; embeddings,
    modulation, norms and the output layer stay with AdamW.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        odd = any(x in name for x in ("norm", "scale_shift", "conv_shortcut"))
        if config.muon_lr and parameter.ndim > 1 and "blocks." in name and not odd:
            parts["dense"].append(parameter if parameter.ndim == 2 else _as_matrix(parameter))
        else:
            parts["bias" if "relative_attention_bias" in name else "rest"].append(parameter)
    groups: list[dict[str, Any]] = [{"params": parts["rest"], "lr": config.lr}]
    if parts["bias"]:  # logits that must grow to 5 or so before a head looks at one neighbour
        groups.append({"params": parts["bias"], "lr": BIAS_RATE * config.lr, "weight_decay": 0.0})
    decay: Any = {"weight_decay": config.weight_decay}
    optimizers = [_adamw(config.optimizer)(groups, betas=config.betas, **decay)]
    if config.muon_lr and parts["dense"]:
        muon = torch.optim.Muon(parts["dense"], config.muon_lr, momentum=0.95, adjust_lr_fn="match_rms_adamw", **decay)
        optimizers.append(muon)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers


def _adamw(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, or the one whose moments take a byte each (Dettmers et al. 2022)."""
    if kind == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("bitsandbytes is not installed; run `pip install 'cinema[quant]'`, or take adamw") from None
    return AdamW8bit


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
    tensors = {f"model.{k}": v for k, v in trained(run.task.model).items()}
    tensors |= {f"ema.{k}": v for k, v in run.ema.items()}
    for i, optimizer in enumerate(run.optimizers):
        for j, parameter in enumerate(_parameters(optimizer)):
            state = optimizer.state[parameter].items()
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in state if isinstance(v, Tensor)}
            tensors |= {f"optimizer.{i}.{j}.{k}{NUMBER}": torch.tensor(v) for k, v in state if isinstance(v, int)}
    told = {name: getattr(run, name) for name in PROGRESS} | {"data": run.task.data_name}
    told["config"] = run.config.model_dump(mode="json")
    kept = whole(run, tensors)
    if not run.main:
        return
    write_card(run, run.out)
    with atomic(run.out / f"checkpoint-{run.step:07d}.safetensors") as part:
        save_file(kept, part, {k: json.dumps(v) for k, v in told.items()})
    for old in sorted(run.out.glob(CHECKPOINTS))[: -run.config.keep]:
        old.unlink()


@torch.no_grad()
def _load_checkpoint(run: Run, path: Path) -> None:
    """Put a run back to where the checkpoint was written."""
    with safe_open(path, "pt") as file:
        told = {k: json.loads(v) for k, v in file.metadata().items()}
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    config = run.config.model_dump(mode="json")
    if not {*PROGRESS, "data"} <= {*told} or any(told["config"].get(k) != config[k] for k in {*config} - {*WATCHING}):
        raise UserError(f"{run.out} holds a run with another config; choose another folder or remove it")
    if told["data"] != run.task.data_name:
        changed = f"the films have changed from {told['data']} to {run.task.data_name}"
        raise UserError(f"{run.out}: {changed} since this run began; bring them back or choose another folder")

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    vars(run).update({name: told[name] for name in PROGRESS})
    for kept, own in ((under("ema."), run.ema), (under("model."), trained(run.task.model))):
        for name, value in own.items():
            value.copy_(_shared(kept[name].to(value.device), value))
    for i, optimizer in enumerate(run.optimizers):
        for j, parameter in enumerate(_parameters(optimizer)):
            kept = {k: _shared(v.to(parameter.device), parameter) for k, v in under(f"optimizer.{i}.{j}.").items()}
            numbers = {k.removesuffix(NUMBER): v.item() for k, v in kept.items() if k.endswith(NUMBER)}
            optimizer.state[parameter] = {k: v for k, v in kept.items() if not k.endswith(NUMBER)} | numbers


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def write_card(run: Run, folder: Path) -> None:
    """Write `README.md` in a folder: data, steps, configuration, figures, use, limits, and the licence of the base."""
    told = run.config.model_dump(mode="json", exclude_defaults=True)
    for said in (told, told.get("options", {})):  # paths are private
        said |= {k: Path(v).name for k, v in said.items() if isinstance(v, str) and Path(v).exists()}
    init, processes, device = told.get("init"), run.accelerator.num_processes, run.accelerator.device
    tags = ["captain-cinema", run.config.task]
    facts = ModelCardData(base_model=init, tags=tags, license="other" if init else "apache-2.0")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU ({platform.machine()})"
    figures = "".join(f"- {name}: {value:g}\n" for name, value in (run.log[-1] if run.log else {}).items())
    # fmt: off
    text = CARD.format(
        facts=facts.to_yaml().strip(), name=run.out.name, step=run.step, total=run.config.total_steps,
        hours=sum(line.get("seconds", 0.0) for line in run.log) / 3600,
        machine=f"{name}, {processes} processes" if processes > 1 else name,
        base=init or "none, trained from nothing",
        licence="that of the base binds these weights, too" if init else "Apache-2.0, as the code",
        figures=figures or "none yet\n", config=yaml.safe_dump(told, sort_keys=False), **run.task.card(),
    )
    # fmt: on
    write_text(folder / "README.md", text)
