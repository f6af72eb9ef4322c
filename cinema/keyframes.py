"""Keyframe planning: a story's keyframes, drawn one after another, each remembering the ones before.

Context is what GoldenMem keeps of the earlier keyframes: shrunk in pixel space, encoded, made slightly noisy
(paper, section 4.2) and run once through the transformer into a cache. Every denoising step then runs the
newest pair alone. Axes: `n` frames, `h w` patches, `s` image tokens, `c` channels.
"""

import hashlib
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange, repeat
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from cinema.config import KeyframeSettings, Preset
from cinema.errors import UserError
from cinema.flow import add_noise, euler, schedule
from cinema.goldenmem import PATCH, Layout, coordinates, shrink
from cinema.story import TAG, Story
from cinema.transformer import ContextCache, InterleavedFluxTransformer, PairGroup

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Keyframe:
    """A planned keyframe.

    Attributes:
        index: of its shot.
        image: RGB, as large as the preset says.
        caption: as the model read it, with the story's tags replaced by tags that the model knows.
        remembered: (shot, side of its GoldenMem level in patches) of the context, in the order of time.
    """

    index: int
    image: Image.Image
    caption: str
    remembered: list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """A caption as the transformer reads it: T5's states and CLIP's pooled state, both of one caption."""

    states: Float[Tensor, "t e"]
    pooled: Float[Tensor, "f"]


@dataclass
class TextEncoders:
    """CLIP and T5 with their tokenizers, used exactly as `FluxPipeline` uses them.

    Attributes:
        length: text tokens that captions are padded to and cut at, without an attention mask.
    """

    tokenizer: Any
    text_encoder: CLIPTextModel
    tokenizer_2: Any
    text_encoder_2: T5EncoderModel
    length: int
    _warned: bool = field(default=False, init=False)

    @torch.no_grad()
    def __call__(self, caption: str) -> Encoded:
        """Encode one caption; the first that is too long gives a warning."""
        words = self._ids(self.tokenizer_2, caption, self.length).to(self.text_encoder_2.device)
        pooled = self._ids(self.tokenizer, caption, self.tokenizer.model_max_length).to(self.text_encoder.device)
        if not self._warned and (count := len(self.tokenizer_2(caption).input_ids)) > self.length:
            self._warned = True
            text = f"a caption has {count} tokens and only {self.length} are read, shorten it: {caption[:60]!r} ..."
            warnings.warn(text, stacklevel=2)
        return Encoded(self.text_encoder_2(words)[0][0], self.text_encoder(pooled).pooler_output[0])

    @staticmethod
    def _ids(tokenizer: Any, caption: str, length: int) -> Tensor:
        found = tokenizer([caption], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids


@torch.no_grad()
def encode_frames(vae: AutoencoderKL, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n s c"]:
    """Frames in [-1, 1] → Flux's packed tokens: shifted and scaled latents in 2 x 2 patches, in float32."""
    latents = vae.encode(frames.to(vae.device, vae.dtype)).latent_dist.mode().float()
    latents = (latents - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    return rearrange(latents, "n c (h i) (w j) -> n (h w) (c i j)", i=2, j=2)


@torch.no_grad()
def decode_tokens(vae: AutoencoderKL, tokens: Float[Tensor, "n s c"], side: int) -> Float[Tensor, "n 3 height width"]:
    """Undo `encode_frames` for frames `side` patches high; RGB around [-1, 1] in float32."""
    latents = rearrange(tokens, "n (h w) (c i j) -> n c (h i) (w j)", h=side, i=2, j=2)
    latents = latents / vae.config["scaling_factor"] + vae.config["shift_factor"]
    return vae.decode(latents.to(vae.device, vae.dtype)).sample.float()


def to_tensor(image: Image.Image) -> Float[Tensor, "1 3 height width"]:
    """A picture → RGB in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return rearrange(pixels, "h w c -> 1 c h w").float() / 127.5 - 1


def to_image(frame: Float[Tensor, "1 3 height width"]) -> Image.Image:
    """RGB in [-1, 1], cut there → a picture."""
    pixels = ((frame / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "1 c h w -> h w c").cpu().numpy())


def rename(story: Story, known: tuple[str, ...]) -> list[str]:
    """Captions with the story's tags mapped onto tags that the model knows.

    A known tag stays; the others take, in the order of the cast, the known tags that are free. Nothing is
    renamed if `known` is empty.

    Raises:
        UserError: there are more characters than known tags.
    """
    cast = [character.tag for character in story.cast]
    if known and len(cast) > len(known):
        raise UserError(f"{story.title}: {len(cast)} characters, but these weights know {len(known)} names; use fewer")
    free = iter([tag for tag in known if tag not in cast])
    names = {tag: tag if tag in known or not known else next(free) for tag in cast}
    return [re.sub(TAG, lambda found: names[found[0]], shot.caption) for shot in story.shots]


def part_loader(
    name: str, what: str, variable: str, dtype: str, device: str | torch.device
) -> Callable[[Any, str], Any]:
    """A function (class, subfolder) → that part of a diffusers folder or hub name, ready for inference.

    Raises:
        UserError: `name` is a folder that holds no `what`; `variable` is what to set.
    """
    local = Path(name).is_absolute() or name.startswith(".") or Path(name).exists()
    if local and not (Path(name) / "model_index.json").is_file():
        raise UserError(f"{name}: no {what} is there (no model_index.json); set {variable}")

    def part(kind: Any, folder: str) -> Any:
        model = kind.from_pretrained(name, subfolder=folder, torch_dtype=getattr(torch, dtype), use_safetensors=True)
        return model.to(device).eval().requires_grad_(False)

    return part


class KeyframePlanner:
    """Plans the keyframes of stories with the parts of a Flux pipeline.

    Raises:
        UserError: the settings' width is not twice the height, or the height is no multiple of 16.
    """

    def __init__(
        self,
        transformer: InterleavedFluxTransformer,
        vae: AutoencoderKL,
        text: TextEncoders,
        settings: KeyframeSettings,
        tags: tuple[str, ...] = (),
    ) -> None:
        self.side, rest = divmod(settings.height, PATCH)
        if rest or settings.width != 2 * settings.height:
            size = f"{settings.height} x {settings.width}"
            raise UserError(
                f"keyframes of {size} pixels: the height must be a multiple of {PATCH}, the width its double"
            )
        self.transformer, self.vae, self.text = transformer, vae, text
        self.settings, self.tags = settings, tags

    @classmethod
    def from_preset(cls, preset: Preset, device: str | torch.device = "cpu") -> "KeyframePlanner":
        """Load the parts from the diffusers folder (or hub name) `preset.keyframes.weights`.

        Raises:
            UserError: nothing loadable is there.
        """
        name = preset.keyframes.weights
        part = part_loader(name, "Flux pipeline", "CINEMA_KEYFRAME_WEIGHTS", preset.dtype, device)
        try:
            transformer = part(InterleavedFluxTransformer, "transformer")
            vae = part(AutoencoderKL, "vae")
            clip, t5 = part(CLIPTextModel, "text_encoder"), part(T5EncoderModel, "text_encoder_2")
            tokenizers = [AutoTokenizer.from_pretrained(name, subfolder=f) for f in ("tokenizer", "tokenizer_2")]
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise UserError(f"{name}: the keyframe weights cannot be loaded ({reason}); check the folder") from error
        text = TextEncoders(tokenizers[0], clip, tokenizers[1], t5, preset.keyframes.text_tokens)
        return cls(transformer, vae, text, preset.keyframes, preset.tags)

    def plan(
        self,
        story: Story,
        seed: int = 0,
        on_progress: Progress | None = None,
        known: Mapping[int, Image.Image] | None = None,
    ) -> list[Keyframe]:
        """All keyframes of a story, as `iterate` yields them."""
        return list(self.iterate(story, seed, on_progress, known))

    def iterate(
        self,
        story: Story,
        seed: int = 0,
        on_progress: Progress | None = None,
        known: Mapping[int, Image.Image] | None = None,
    ) -> Iterator[Keyframe]:
        """Yield keyframes in the order of the story, each as soon as it is drawn.

        A keyframe depends on its caption, the keyframes it remembers and noise seeded by (seed, shot), so a
        run that goes on from `known` ends like one that never stopped, and one shot can be drawn anew alone.

        Args:
            seed: another seed, another film.
            on_progress: called with (denoising steps done, of how many, message).
            known: keyframes that exist, by shot; cropped to size, not drawn, remembered by later ones.

        Raises:
            UserError: there are more characters than the weights know names.
        """
        known, captions = known or {}, rename(story, self.tags)
        steps, total = self.settings.steps, self.settings.steps * sum(i not in known for i in range(len(captions)))
        memory, done = _Memory(self), 0
        for i, caption in enumerate(captions):
            remembered: list[tuple[int, int]] = []
            if i in known:
                image = ImageOps.fit(known[i].convert("RGB"), (self.settings.width, self.settings.height))
            else:
                tell = step_teller(on_progress, done, total, f"keyframe {i + 1} of {len(captions)}")
                image, remembered = self._draw(caption, memory, _generator(seed, i), tell)
                done += steps
            memory.add(i, image, caption)
            yield Keyframe(i, image, caption, remembered)

    def group(
        self,
        latents: Float[Tensor, "b p s c"],
        texts: list[Encoded],
        sigma: Float[Tensor, "b p"],
        side: int,
        index: list[int],
    ) -> PairGroup:
        """One fold of pairs for the transformer, on its device and in its dtype; `texts` run over b, then p."""
        device, dtype = self.transformer.device, self.transformer.dtype
        states, pooled = torch.stack([t.states for t in texts]), torch.stack([t.pooled for t in texts])
        return PairGroup(
            latents=latents.to(device, dtype),
            text=rearrange(states, "(b p) t e -> b p t e", p=len(index)).to(device, dtype),
            pooled=rearrange(pooled, "(b p) f -> b p f", p=len(index)).to(device, dtype),
            sigma=sigma.to(device),
            ids=coordinates(side, self.side).to(device),
            index=torch.tensor(index),
        )

    @torch.no_grad()
    def _draw(
        self, caption: str, memory: "_Memory", generator: torch.Generator, on_step: Callable[[int], None] | None
    ) -> tuple[Image.Image, list[tuple[int, int]]]:
        channels, guidance = self.transformer.config["in_channels"], self.settings.distilled_guidance
        noise = torch.randn(1, 2 * self.side * self.side, channels, generator=generator).to(self.transformer.device)
        groups, remembered = memory.recall(generator)
        cache = self.transformer.encode_context(groups, causal=True, guidance=guidance) if groups else None
        velocity = self._velocity(caption, len(remembered), cache)
        drawn = euler(velocity, noise, schedule(self.settings.steps, self.settings.shift), on_step)
        return to_image(decode_tokens(self.vae, drawn, self.side)), remembered

    def _velocity(self, caption: str, place: int, cache: ContextCache | None) -> Callable[[Tensor, float], Tensor]:
        """Velocity of the newest pair; with guidance > 1 the empty caption runs beside it, on the same cache."""
        scale = self.settings.guidance
        texts = [self.text(caption), self.text("")] if scale > 1 else [self.text(caption)]

        def velocity(x: Float[Tensor, "1 s c"], sigma: float) -> Float[Tensor, "1 s c"]:
            latents = repeat(x, "p s c -> b p s c", b=len(texts))
            group = self.group(latents, texts, torch.full((len(texts), 1), sigma), self.side, [place])
            out = self.transformer.forward_pairs([group], True, cache, self.settings.distilled_guidance)[0].float()
            return out[0] if len(texts) == 1 else out[1] + scale * (out[0] - out[1])

        return velocity


class _Memory:
    """The newest keyframes, as many as GoldenMem keeps; each caption and each size is encoded once."""

    def __init__(self, planner: KeyframePlanner) -> None:
        self.planner = planner
        settings = planner.settings
        self.shots: deque[int] = deque(maxlen=settings.memory_levels * settings.memory_group - 1)
        self.frames: dict[int, Image.Image] = {}
        self.captions: dict[int, str] = {}
        self.texts: dict[int, Encoded] = {}
        self.latents: dict[int, dict[int, Float[Tensor, "_s c"]]] = {}

    def add(self, shot: int, image: Image.Image, caption: str) -> None:
        self.shots.append(shot)
        self.frames[shot], self.captions[shot], self.latents[shot] = image, caption, {}
        for store in (self.frames, self.captions, self.texts, self.latents):
            for old in [known for known in store if known not in self.shots]:
                del store[old]  # type: ignore[attr-defined]

    def recall(self, generator: torch.Generator) -> tuple[list[PairGroup], list[tuple[int, int]]]:
        """Noisy context for the next keyframe, a group per level, and which shot is remembered how large."""
        planner, shots = self.planner, list(self.shots)
        settings = planner.settings
        layout = Layout(
            len(shots) + 1, planner.side, settings.memory_levels, settings.memory_group, settings.memory_ratio
        )
        groups = []
        for side, places in layout.by_level():
            if old := [i for i in places if i < len(shots)]:  # the last place is the next keyframe's own
                latents = torch.stack([self._latents(shots[i], side) for i in old])[None]
                noise = torch.randn(latents.shape, generator=generator).to(latents.device)
                sigma = torch.full((1, len(old)), settings.context_sigma, device=latents.device)
                texts = [self._text(shots[i]) for i in old]
                groups.append(planner.group(add_noise(latents, noise, sigma), texts, sigma, side, old))
        return groups, list(zip(shots, layout.sides, strict=False))

    def _latents(self, shot: int, side: int) -> Float[Tensor, "s c"]:
        known = self.latents[shot]
        if side not in known:
            known[side] = encode_frames(self.planner.vae, shrink(to_tensor(self.frames[shot]), side))[0]
        return known[side]

    def _text(self, shot: int) -> Encoded:
        if shot not in self.texts:
            self.texts[shot] = self.planner.text(self.captions[shot])
        return self.texts[shot]


def _generator(seed: int, shot: int) -> torch.Generator:
    """Randomness of one keyframe: on the CPU, so that every device draws the same film."""
    digest = hashlib.blake2b(f"keyframe {shot} of film {seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def step_teller(tell: Progress | None, before: int, total: int, message: str) -> Callable[[int], None] | None:
    """`tell` for one of several runs of denoising steps, `before` steps being done; None if nobody is told."""
    return None if tell is None else lambda done: tell(before + done, total, message)
