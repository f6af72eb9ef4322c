"""Films as training data: encoded once, then read by position; and trained pipelines as folders."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import cast_training_params
from jaxtyping import Bool, Float
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import DirectoryPath, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cinema.config import Preset, preset
from cinema.errors import UserError
from cinema.files import atomic
from cinema.interleave import CuratedFilms, Films, ToyFilms
from cinema.keyframes import load_parts
from cinema.progress import Progress, quiet
from cinema.training.config import Stage
from cinema.training.loop import Task

# What adapters are added to, of Flux, as the budget says, and of LTX-Video.
ADAPTED = r".*attn[12]?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"


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
        on_progress: Progress = quiet,
    ) -> None:
        drawn = films.variants(0), films.frames(0, 64)[0].tobytes()  # by other code, other films
        self.folder = folder / f"{films.name}-{fingerprint(encoders, (settings, drawn))}"
        process, count = processes(), len(films.lengths)
        for film in range(process.process_index, count, process.num_processes):
            if not self._readable(film):
                on_progress(film, count, "films encoded")
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
    preset: str = "toy"  #: whose sizes and memory the model is to work with
    data: DirectoryPath | None = None  #: folder of curated films; without it there are toy movies
    movies: PositiveInt = 400  #: toy movies in the training set
    shots: PositiveInt = 12  #: of each of them
    shift: PositiveFloat = 4.0  #: time shift of the training noise
    lora: PositiveInt | None = None  #: rank of adapters on the attention of a frozen base; without it all is trained
    quantise: bool = False  #: keep the frozen base's blocks in 4 bits (NF4, Dettmers et al. 2023)
    recompute: bool = False  #: gradient checkpointing
    compiled: bool = False  #: torch.compile for every block
    memory: dict[str, Any] = field(default_factory=dict)  #: settings of the model's memory other than the preset's
    kind = "train"  # of toy movies: other kinds are other movies

    @property
    def data_name(self) -> str:
        """As in `Task`."""
        return self.films.name

    @property
    def seconds(self) -> float:
        """That a shot of curated films lasts at least."""
        return 0.0

    @property
    def chosen(self) -> Preset:
        """What the model is to work with."""
        return preset(self.preset).remembering(**self.memory)

    @cached_property
    def films(self) -> Films:
        """What it is trained on."""
        if self.data:
            return CuratedFilms(self.data, self.seconds)
        return ToyFilms(self.seed, self.movies, self.shots, self.kind)

    def check(self, stage: Stage) -> None:
        """As in `Task`; films that are shorter than the stage's windows are left out of it, with a warning."""
        if short := sum(length < stage.pairs for length in self.films.lengths):
            told = f"{short} of {len(self.films.lengths)} films have fewer than {stage.pairs} shots"
            warnings.warn(f"{told} and are left out of the stages with so many pairs", stacklevel=2)

    def card(self) -> dict[str, str]:
        """As in `Task`."""
        lengths = self.films.lengths
        return super().card() | {
            "data": f"{sum(lengths):,} captioned shots of {len(lengths):,} films ({self.films.name})"
        }

    def part(self, kind: Any, folder: Path | None, name: str, pipeline: str) -> Any:
        """A part that is not trained, from a folder of its own or from `init`, a "keyframe" or "video" pipeline."""
        if folder:
            return kind.from_pretrained(folder, torch_dtype=torch.bfloat16).eval().requires_grad_(False)
        if not self.init:
            raise ValueError(f"there is neither a folder for the {name!r} nor an `init` that has one")
        return load_parts(self.init, pipeline, "bfloat16", "cpu", {name: kind})[0]

    def transformer(self, kind: Any, pipeline: str, new: Callable[[], Any]) -> Any:
        """What is trained: `init`'s transformer or a new one, whole, or adapters on it."""
        if self.quantise and not self.lora:
            raise ValueError("quantise freezes the base, so there is nothing to train without lora")
        dtype = "bfloat16" if self.lora else "float32"
        parts = {"transformer": kind}
        made = load_parts(self.init, pipeline, dtype, "cpu", parts)[0] if self.init else new()
        made = made.to(getattr(torch, dtype))
        made.requires_grad_(not self.lora)
        if self.quantise:
            quantise(made)
        if self.lora:
            made.add_adapter(LoraConfig(r=self.lora, lora_alpha=self.lora, target_modules=ADAPTED))
            cast_training_params(made)  # adapters to float32
        if self.recompute:
            made.enable_gradient_checkpointing(run_again)
        if self.compiled:
            made.compile_repeated_blocks()
        return made


def run_again(block: nn.Module, *args: Any) -> Any:
    """Gradient checkpointing of a block; diffusers calls it.

    Who trains in half precision swaps parameters for the time of the call; running again needs the same ones.
    """
    swapped: dict[str, Any] = {k: p for k, p in block.named_parameters() if not isinstance(p, nn.Parameter)}
    run = (lambda *given: torch.func.functional_call(block, swapped, given)) if swapped else block
    return checkpoint(run, *args, use_reentrant=False)


def save_adapters(pipeline: Any, folder: Path, transformer: Any) -> None:
    """Write adapters as stock `pipeline.load_lora_weights` reads them, in bfloat16."""
    layers = get_peft_model_state_dict(transformer)
    pipeline.save_lora_weights(folder, {name: x.bfloat16().contiguous() for name, x in layers.items()})


def noise_figures(
    errors: Float[Tensor, "b n"], sigma: Float[Tensor, "b n"], learns: Bool[Tensor, "b n"]
) -> dict[str, Float[Tensor, ""]]:
    """The mean error of what learns by quarters of the noise level; NaN where nothing does."""
    errors, quarter = errors.detach().cpu(), (4 * sigma).floor()
    return {f"sigma {i / 4:.2f}": errors[learns & (quarter == i)].mean() for i in range(4)}


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


def quantise(model: nn.Module) -> None:
    """Keep the linear layers of a frozen model's blocks in 4 bits; UserError where bitsandbytes is not installed.

    They are made small on their way to a device, the CPU included.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise UserError(
            "bitsandbytes is not installed; run `pip install 'cinema[quant]'`, or leave quantise away"
        ) from None
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and "blocks." in name:
            small = Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.bfloat16, quant_type="nf4")
            small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            small.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, small.to("cpu"))
