"""What a training run is told: one YAML file, every key known, every number checked."""

import math
from bisect import bisect
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from cinema.errors import UserError
from cinema.story import read_text

Share = Annotated[float, Field(ge=0, le=1)]


class Given(BaseModel, extra="forbid"):
    """What conditions the windows of shots that a video model is trained on, and how often."""

    keyframes: Share = 0.9  #: share of shots that begin on their keyframe
    outside: Share = 0.0  #: share of steps that show keyframes of shots outside the windows
    shots: Share = 0.0  #: share of windows whose first shots, one or more but not all, are there whole


class Stage(BaseModel, extra="forbid", allow_inf_nan=False):
    """One stage of progressive training; its steps are optimiser steps."""

    steps: PositiveInt
    batch: PositiveInt  #: samples a step: stories, frames or clips, whatever the task trains on
    pairs: PositiveInt = 1  #: keyframe-text pairs in a story, or shots in a window
    group: PositiveInt | None = None  #: pairs per GoldenMem level; without it all pairs are full-size
    lr: PositiveFloat = 1.0  #: factor on the run's learning rates
    mask: Literal["causal", "full"] | None = None  #: who sees whom; the preset's if not given
    shift: PositiveFloat | None = None  #: time shift of the noise, the task's if not given
    untold: Share = 0.0  #: share of windows whose captions tell no looks: what is remembered
    #: is seen, not read
    given: Given = Given()  #: what conditions windows of shots
    shared_noise: bool = False  #: one noise level for a whole window, as in a stock model; else each pair has its own


class TrainConfig(BaseModel, extra="forbid", allow_inf_nan=False):
    """A training run."""

    task: str  #: what is trained, one of ``cinema.training.TASKS``
    seed: int = Field(default=0, ge=0, lt=2**63)
    stages: list[Stage] = Field(min_length=1)
    options: dict[str, Any] = {}  #: the task's own settings, its fields
    accumulate: PositiveInt = 1  #: passes that a process makes for one step
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  #: with moments in float32, or in 8 bits
    lr: PositiveFloat = 8e-4  #: AdamW's
    muon_lr: PositiveFloat | None = None  #: where it is given, Muon takes the blocks' matrices
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: NonNegativeInt = 60  #: steps of linear warm-up
    final_lr: float = Field(default=0.02, ge=0, le=1)  #: share of the rate where the cosine ends
    decay_from: float = Field(default=0.0, ge=0, lt=1)  #: share of all steps before the cosine begins
    grad_clip: PositiveFloat = 1.0
    ema: float = Field(default=0.99, ge=0, lt=1)  #: decay of the weights' average, which is what is saved and sampled
    precision: Literal["no", "bf16"] = "bf16"
    log_every: PositiveInt = 20
    save_every: PositiveInt = 500
    sample_every: NonNegativeInt = 1000  #: 0 for never
    tracker: Literal["tensorboard", "wandb"] = "tensorboard"  #: besides log.jsonl
    keep: PositiveInt = 2  #: checkpoints
    init: str | None = None  #: folder of weights to start from

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(s.steps for s in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that this step (from 0) belongs to; the last one after the end."""
        ends = [*accumulate(stage.steps for stage in self.stages)]
        return self.stages[min(bisect(ends, step), len(ends) - 1)]

    def position(self, step: int) -> int:
        """Samples of all steps before this one."""
        ends = [0, *accumulate(stage.steps for stage in self.stages)]
        spans = zip(self.stages, ends[:-1], ends[1:], strict=True)
        return sum(stage.batch * (min(step, end) - start) for stage, start, end in spans if step > start)

    def rate(self, step: int) -> float:
        """Factor on the learning rates at this step: warm-up, plateau, cosine decay, times the stage's own."""
        done = max(0.0, (step / self.total_steps - self.decay_from) / (1 - self.decay_from))
        cosine = self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return min(1.0, (step + 1) / (self.warmup + 1)) * cosine * self.stage_at(step).lr


def first_problem(error: ValidationError) -> str:
    """Where the first thing is that pydantic complains of, what, and what stands there."""
    first = error.errors(include_url=False)[0]
    where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    found = f" (given: {first['input']!r})" if isinstance(first["input"], str | float | int) else ""
    return f"{where}{': ' * bool(where)}{message[0].lower()}{message[1:]}{found}"


def load_config(path: Path) -> TrainConfig:
    """Read a run's YAML file; UserError if it is missing, does not parse, or has an unknown key or a bad number."""
    text = read_text(path, "a training config in YAML")
    try:
        return TrainConfig.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; correct it there") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that cannot be
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct it there") from None
