"""Training: one loop, a task per model, stages, exact resume."""

from importlib import import_module
from pathlib import Path

from pydantic import ValidationError

from cinema.errors import UserError
from cinema.progress import Progress, quiet
from cinema.training.config import first_problem, load_config
from cinema.training.loop import Run, Task, run_training

TASKS = {
    "autoencoder": "autoencoder:AutoencoderTask",
    "clip": "text:ClipTask",
    "t5": "text:T5Task",
    "retrieval": "retrieval:RetrievalTask",
    "keyframes": "keyframes:KeyframeTask",
    "video": "video:VideoTask",
    "video_autoencoder": "video_autoencoder:VideoAutoencoderTask",
}


def train(config: Path, out: Path, resume: bool = False, on_progress: Progress = quiet) -> Run:
    """Train what the YAML file `config` describes, in folder `out`; see `run_training`."""
    told = load_config(config)
    return run_training(told, make_task(told.task, told.seed, told.init, told.options), out, resume, on_progress)


def make_task(name: str, seed: int, init: str | None, options: dict) -> Task:
    """The task of that name; UserError if there is none, it lacks an option or a folder, or an option does not fit."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    module, kind = TASKS[name].split(":")
    try:
        return getattr(import_module(f"cinema.training.{module}"), kind)(seed=seed, init=init, **options)
    except (TypeError, ValueError, IndexError, OSError) as error:  # what a number or a word that does not fit runs into
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error).strip().split("\n")[0]
        raise UserError(f"task {name}: {reason.rstrip('.')}; train that part first, or correct the options") from None
