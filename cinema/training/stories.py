"""Films as training data: encoded once, then read by position; and trained pipelines as folders."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cinema.errors import UserError
from cinema.files import atomic
from cinema.interleave import Films, ToyFilms
from cinema.training.loop import Task


def processes() -> PartialState:
    """Which of how many processes this one is, and its device."""
    waiting = timedelta(days=1)  # for one that encodes, samples or saves
    return PartialState(cpu=not torch.cuda.is_available(), timeout=waiting)


class Cache:
    """What encoders make of every film: made once and kept in a file each, so that a killed run goes on.

    The folder's name tells the films, the encoders and whatever else the tensors depend on. A file that cannot be read
    is made again. Of several processes each makes a part, and has to wait for the others before it reads.
    """

    def __init__(
        self,
        folder: Path,
        films: Films,
        encoders: Iterable[nn.Module],
        settings: Any,
        encode: Callable[[int], Mapping[str, Tensor]],
    ) -> None:
        self.folder = folder / f"{films.name}-{fingerprint(encoders, settings)}"
        process = processes()
        for film in range(process.process_index, len(films.lengths), process.num_processes):
            if not self._readable(film):
                with atomic(self._path(film)) as part:
                    save_file({name: x.contiguous() for name, x in encode(film).items()}, part)

    def read(self, film: int, *names: str) -> list[Tensor]:
        """Tensors of a film, on the CPU; UserError if its file was damaged meanwhile."""
        try:
            with safe_open(self._path(film), "pt") as file:
                return [file.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path(film)}: {error}; run again, and it is made anew") from None

    def _path(self, film: int) -> Path:
        return self.folder / f"{film:06d}.safetensors"

    def _readable(self, film: int) -> bool:
        try:
            with safe_open(self._path(film), "pt"):
                return True
        except (SafetensorError, OSError):
            return False


@dataclass(kw_only=True)
class FilmTask(Task):
    """A task on windows of films."""

    cache: Path  #: folder for what encoders make of them
    movies: PositiveInt = 400  #: toy movies in the training set
    shots: PositiveInt = 12  #: of each of them
    shift: PositiveFloat = 4.0  #: time shift of the training noise
    kind = "train"  # of toy movie: other kinds are other movies

    @property
    def toys(self) -> ToyFilms:
        """The toy movies."""
        return ToyFilms(self.seed, self.movies, self.shots, self.kind)


def fingerprint(encoders: Iterable[nn.Module], settings: Any = ()) -> str:
    """What tells encoders apart: a digest of models' weights, and of anything else that latents depend on."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=6)
    for encoder in encoders:
        for name, tensor in encoder.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_pipeline(kind: Any, folder: Path, shift: float, **parts: Any) -> None:
    """Write a folder that stock `kind.from_pretrained` loads, in bfloat16; the parts stay as they are."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    halves = {name: halved(part) if isinstance(part, nn.Module) else part for name, part in parts.items()}
    kind(scheduler=scheduler, **halves).save_pretrained(folder)


def halved(module: Any, device: torch.device | str = "cpu") -> Any:
    """A copy in bfloat16 on a device, without ever holding another one."""
    kept = [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
    memo: dict[int, Any] = {id(x): type(x)(x.detach().to(device, torch.bfloat16, copy=True)) for x in kept}
    return copy.deepcopy(module, memo).requires_grad_(False)
