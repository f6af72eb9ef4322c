"""Training: one loop, a task per model, stages, exact resume."""

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from pydantic import ValidationError

from cinema.errors import UserError
from cinema.progress import Progress, quiet
from cinema.training.config import TrainConfig, first_problem, load_config
from cinema.training.loop import Run, Task, run_training

TASKS = {
    "autoencoder": "autoencoder:AutoencoderTask",
    "clip": "text:ClipTask",
    "t5": "text:T5Task",
    "retrieval": "text:RetrievalTask",
    "keyframes": "keyframes:KeyframeTask",
    "video": "video:VideoTask",
    "video_autoencoder": "autoencoder:VideoAutoencoderTask",
}


def train(config: Path, out: Path, resume: bool = False, base: str | None = None, on_progress: Progress = quiet) -> Run:
    """Train what the YAML file `config` describes, in folder `out`; see `run_training`.

    A `base`, folder or hub name, takes the place of its `init`. UserError, before anything is loaded, where memory will
    not do.
    """
    told = load_config(config)
    told = told.model_copy(update={"init": base or told.init})
    check_memory(told)
    task = make_task(told.task, told.seed, told.init, told.options, on_progress)
    return run_training(told, task, out, resume, on_progress)


def check_memory(config: TrainConfig) -> None:
    """UserError if the largest stage needs more memory than a process's device has, as far as the task can tell."""
    need, have, processes = 0, _memory(), int(os.environ.get("WORLD_SIZE", 1))
    with suppress(TypeError, ValueError, LookupError, UserError):  # `make_task` says better what is wrong
        need = task_kind(config.task).needed_bytes(config, processes, parse_flag_from_env("ACCELERATE_USE_FSDP"))
    if need > have:
        raise UserError(
            f"this needs about {need / 2**30:.1f} GiB of memory and {have / 2**30:.1f} GiB are there; "
            "set options.recompute, options.lora or options.quantise, raise accumulate, or lower pairs"
        )


def _memory() -> int:
    """Bytes of the device that training would use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def task_kind(name: str) -> type[Task]:
    """The class of the task of that name; UserError if there is none."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    module, kind = TASKS[name].split(":")
    return getattr(import_module(f"cinema.training.{module}"), kind)


def make_task(name: str, seed: int, init: str | None, options: dict, on_progress: Progress = quiet) -> Task:
    """The task of that name; UserError if there is none, it lacks an option or a folder, or an option does not fit."""
    kind = task_kind(name)
    try:
        return kind(seed=seed, init=init, tell=on_progress, **options)
    except (TypeError, ValueError, IndexError, OSError) as error:  # what a number or a word that does not fit runs into
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error).strip().split("\n")[0]
        raise UserError(f"task {name}: {reason.rstrip('.')}; train that part first, or correct the options") from None
