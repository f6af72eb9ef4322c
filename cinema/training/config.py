"""What a training run is told: one YAML file, every key known, every number checked."""

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from cinema.errors import UserError


class Stage(BaseModel, extra="forbid", allow_inf_nan=False):
    """One stage of progressive training; its steps are optimiser steps."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)  #: samples a step: stories, frames or clips, whatever the task trains on
    pairs: int = Field(default=1, gt=0)  #: keyframe-text pairs in a story, or shots in a window
    group: int | None = Field(default=None, gt=0)  #: pairs per GoldenMem level; without it all pairs are full-size
    lr: float = Field(default=1.0, gt=0)  #: factor on the run's learning rates


class TrainConfig(BaseModel, extra="forbid", allow_inf_nan=False):
    """A training run."""

    task: str  #: what is trained, one of ``cinema.training.TASKS``
    seed: int = Field(default=0, ge=0, lt=2**63)
    stages: list[Stage] = Field(min_length=1)
    options: dict[str, Any] = {}  #: the task's own settings, checked by the task
    lr: float = Field(default=8e-4, gt=0)  #: AdamW's
    muon_lr: float | None = Field(default=None, gt=0)  #: where it is given, Muon takes the blocks' matrices
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=60, ge=0)  #: steps of linear warm-up
    final_lr: float = Field(default=0.02, ge=0, le=1)  #: share of the rate where the cosine ends
    decay_from: float = Field(default=0.0, ge=0, lt=1)  #: share of all steps before the cosine begins
    grad_clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.99, ge=0, lt=1)  #: decay of the weights' average, which is what is saved and sampled
    precision: Literal["no", "bf16"] = "bf16"
    log_every: int = Field(default=20, gt=0)
    save_every: int = Field(default=500, gt=0)
    sample_every: int = Field(default=1000, gt=0)
    keep: int = Field(default=2, gt=0)  #: checkpoints
    init: str | None = None  #: folder of weights to start from

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(s.steps for s in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that this step (from 0) belongs to; the last one after the end."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def rate(self, step: int) -> float:
        """Factor on the learning rates at this step: warm-up, plateau, cosine decay, times the stage's own."""
        done = max(0.0, (step / self.total_steps - self.decay_from) / (1 - self.decay_from))
        cosine = self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return min(1.0, (step + 1) / (self.warmup + 1)) * cosine * self.stage_at(step).lr


def load_config(path: Path) -> TrainConfig:
    """Read a run's YAML file.

    Raises:
        UserError: it is missing, does not parse, or has an unknown key or a bad number; names the key.
    """
    try:
        return TrainConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give the path of a training config in YAML") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(x) for x in first["loc"]) or "the file"
        raise UserError(f"{path}: {where}: {first['msg'].lower()}; correct it there") from None
    except (yaml.YAMLError, ValueError, OSError) as error:  # not text, or a date that cannot be
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct it there") from None
