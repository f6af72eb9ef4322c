"""Training: one loop, a task per model, stages, exact resume."""

from importlib import import_module
from inspect import signature
from pathlib import Path

from cinema.errors import UserError
from cinema.progress import Progress
from cinema.training.config import load_config
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


def train(config: Path, out: Path, resume: bool = False, on_progress: Progress | None = None) -> Run:
    """Train what the YAML file `config` describes, in folder `out`; see `run_training`."""
    told = load_config(config)
    return run_training(told, make_task(told.task, told.seed, told.init, told.options), out, resume, on_progress)


def make_task(name: str, seed: int, init: str | None, options: dict) -> Task:
    """The task of that name.

    Raises:
        UserError: there is no such task, it does not know an option, or a folder that it needs cannot be loaded.
    """
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    module, kind = TASKS[name].split(":")
    folders = {key: options.get(key) for key in ("vae", "clip", "t5", "keyframes")} | {"init": init}
    if missing := [f"{key}: {path}" for key, path in folders.items() if path and not Path(path).is_dir()]:
        raise UserError(f"task {name}: there is no folder {missing[0]!r}; train that part first, or correct the path")
    task = getattr(import_module(f"cinema.training.{module}"), kind)
    if shape := sorted(set(options) - set(signature(task).parameters)) if init else []:
        raise UserError(f"task {name}: {shape[0]!r} is not an option where `init` gives the model; remove it")
    try:
        return task(seed=seed, init=init, **options)
    except (TypeError, ValueError, IndexError) as error:  # what a number or a word that does not fit runs into
        raise UserError(f"task {name}: {error}; correct the options") from None
    except OSError as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"task {name}: {reason}; train that part first, or correct the options") from None
