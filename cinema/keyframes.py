"""Keyframe planning: a story's keyframes, drawn one after another, each remembering the ones before.

Context is what GoldenMem keeps of the earlier keyframes: shrunk in pixel space, encoded, made slightly noisy
(paper, section 4.2) and run once through the transformer into a cache. Every denoising step then runs the
newest pair alone, or a window of new pairs together. Axes: `n` frames, `p` new pairs, `h w` patches, `s` image
tokens, `c` channels.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby, zip_longest
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

from cinema.config import KeyframeSettings, Preset, VideoSettings
from cinema.errors import UserError
from cinema.flow import OnStep, euler, schedule
from cinema.goldenmem import PATCH, Layout, coordinates, shrink, tokens
from cinema.progress import Progress
from cinema.retrieval import ClipRetriever, Moment, Oracle, Random, Recency, Retriever, T5Retriever, describe
from cinema.story import TAG, Story
from cinema.transformer import InterleavedFluxTransformer, PairGroup

Encoded = tuple[Float[Tensor, "t e"], Float[Tensor, "f"]]  # a caption: T5's states and CLIP's pooled state
Pictures = Mapping[int, Image.Image]  # by shot


@dataclass(frozen=True)
class Keyframe:
    """A planned keyframe."""

    index: int  #: of its shot
    image: Image.Image  #: RGB, as large as the preset says
    caption: str  #: as the model read it, with the story's tags replaced by tags that the model knows
    remembered: list[tuple[int, int]]  #: (shot, side of its level in patches) of the context, in the order of time
    recipe: str = ""  #: digest of what it depends on but the weights; empty if it was known


@dataclass
class TextEncoders:
    """CLIP and T5 with their tokenizers, used exactly as `FluxPipeline` uses them: padded and cut, without a mask."""

    tokenizer: Any
    text_encoder: CLIPTextModel
    tokenizer_2: Any
    text_encoder_2: T5EncoderModel
    length: int  #: tokens that T5 reads

    @torch.no_grad()
    def __call__(self, caption: str) -> Encoded:
        """Encode one caption; one that is too long gives a warning."""
        warn_if_cut(self.tokenizer_2, caption, self.length)
        words = tokenize(self.tokenizer_2, [caption], self.length).input_ids.to(self.text_encoder_2.device)
        pooled = tokenize(self.tokenizer, [caption], self.tokenizer.model_max_length).input_ids
        pooled = self.text_encoder(pooled.to(self.text_encoder.device)).pooler_output
        return self.text_encoder_2(words)[0][0], pooled[0]

    def states(self, caption: str) -> Float[Tensor, "t e"]:
        """T5's states of a caption's own tokens."""
        return self(caption)[0][: len(self.tokenizer_2(caption).input_ids)]


def tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> Any:
    """Token ids of captions and their mask, padded and cut to `length`."""
    return tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def warn_if_cut(tokenizer: Any, caption: str, length: int) -> None:
    """Warn of a caption with more than `length` tokens."""
    if (count := len(tokenizer(caption).input_ids)) > length:
        text = f"a caption has {count} tokens and only {length} are read, shorten it: {caption[:60]!r} ..."
        warnings.warn(text, stacklevel=3)


@torch.no_grad()
def encode_frames(vae: AutoencoderKL, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n s c"]:
    """Frames in [-1, 1] → Flux's packed tokens, :eq:`eq-pack`: shifted, scaled latents in 2 x 2 patches, float32."""
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
    """Captions with the story's tags mapped onto tags that the model knows; as they are if `known` is empty.

    A known tag stays; the others take, in the order of the cast, those that are free; UserError if there are too few.
    """
    cast = [character.tag for character in story.cast]
    if known and len(cast) > len(known):
        raise UserError(f"{story.title}: {len(cast)} characters, but these weights know {len(known)} names; use fewer")
    free = iter([tag for tag in known if tag not in cast])
    names = {tag: tag if tag in known or not known else next(free) for tag in cast}
    return [re.sub(TAG, lambda found: names[found[0]], shot.caption) for shot in story.shots]


def check_weights(name: str, kind: str) -> None:
    """UserError if `name` is a folder that holds no "keyframe" or "video" pipeline; what is none may be on the hub."""
    local = Path(name).is_absolute() or name.startswith(".") or Path(name).exists()
    if local and not (Path(name) / "model_index.json").is_file():
        what, variable = {"keyframe": "Flux", "video": "LTX"}[kind], f"CINEMA_{kind.upper()}_WEIGHTS"
        raise UserError(f"{name}: no {what} pipeline is there (no model_index.json); set {variable}")


def load_parts(name: str, kind: str, dtype: str, device: str | torch.device, parts: Mapping[str, Any]) -> list[Any]:
    """Parts of a diffusers folder or hub name, by subfolder and class, ready for inference; else UserError."""
    check_weights(name, kind)

    def load(folder: str, part: Any) -> Any:
        if part is AutoTokenizer:
            return part.from_pretrained(name, subfolder=folder)
        model = part.from_pretrained(name, subfolder=folder, torch_dtype=getattr(torch, dtype), use_safetensors=True)
        return model.to(device).eval().requires_grad_(False)

    try:
        return [load(folder, part) for folder, part in parts.items()]
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{name}: the {kind} weights cannot be loaded ({reason}); check the folder") from error


@dataclass
class KeyframePlanner:
    """Plans the keyframes of stories with the parts of a Flux pipeline; UserError if no level has their size."""

    transformer: InterleavedFluxTransformer
    vae: AutoencoderKL
    text: TextEncoders
    settings: KeyframeSettings
    tags: tuple[str, ...] = ()  #: names that the weights know; any, if there are none
    mark: Callable[[Image.Image, str], Image.Image] | None = None  #: puts a watermark that names its recipe into each

    def __post_init__(self) -> None:
        self.side, rest = divmod(self.settings.height, PATCH)
        if rest or self.settings.width != 2 * self.settings.height:
            rule = f"the height must be a multiple of {PATCH}, the width its double"
            raise UserError(f"keyframes of {self.settings.height} x {self.settings.width} pixels: {rule}")

    @classmethod
    def from_preset(cls, preset: Preset, device: str | torch.device = "cpu") -> "KeyframePlanner":
        """Load the parts from `preset.keyframes.weights`; UserError if nothing loadable is there."""
        parts = {"transformer": InterleavedFluxTransformer, "vae": AutoencoderKL, "tokenizer": AutoTokenizer}
        parts |= {"text_encoder": CLIPTextModel, "tokenizer_2": AutoTokenizer, "text_encoder_2": T5EncoderModel}
        loaded = load_parts(preset.keyframes.weights, "keyframe", preset.dtype, device, parts)
        transformer, vae, clip_tokenizer, clip, t5_tokenizer, t5 = loaded
        text = TextEncoders(clip_tokenizer, clip, t5_tokenizer, t5, preset.keyframes.text_tokens)
        return cls(transformer, vae, text, preset.keyframes, preset.tags)

    def plan(
        self, story: Story, seed: int = 0, on_progress: Progress | None = None, known: Pictures | None = None
    ) -> list[Keyframe]:
        """All keyframes of a story, as `iterate` yields them."""
        return list(self.iterate(story, seed, on_progress, known))

    def iterate(
        self,
        story: Story,
        seed: int = 0,
        on_progress: Progress | None = None,
        known: Pictures | None = None,
        keep: Callable[[int, str], Image.Image | None] | None = None,
    ) -> Iterator[Keyframe]:
        """Yield keyframes in the order of the story, each as soon as it is drawn.

        A keyframe depends on its caption, the keyframes it remembers and noise seeded by (seed, shot), so a
        run that goes on from `known` ends like one that never stopped, and one shot can be drawn anew alone; with
        a window, its whole window. `known` keyframes, by shot, are cropped to size and remembered, not drawn. `keep`
        is asked for each of the others, by shot and recipe, whether there is a picture already. UserError as for
        `rename`.
        """
        known, captions, settings = known or {}, rename(story, self.tags), self.settings
        told = (shot.model_copy(update={"caption": line}) for shot, line in zip(story.shots, captions, strict=True))
        moments = [Moment(shot, describe(story, own.caption)) for shot, own in zip(told, story.shots, strict=True)]
        memory, device = list[Remembered](), str(self.transformer.device)
        retriever = make_retriever(settings, self.text.states, device, seed)
        by_window = groupby(range(len(captions)), lambda i: (i // settings.window, i in known))
        windows = [list(shots) for _, shots in by_window]
        todo = [shots for shots in windows if shots[0] not in known]
        for shots in windows:
            images: Any = [known.get(i) for i in shots]
            remembered, recipes = list[tuple[int, int]](), [""] * len(shots)
            if shots in todo:
                order = self._choose(retriever, [moments[i] for i in shots], shots[0])
                context = [memory[j] for j in sorted(order)]  # in the order of time
                layout = self._layout([order.index(old.shot) for old in context], len(shots))
                remembered = [(old.shot, side) for old, side in zip(context, layout.sides, strict=False)]
                lines = [captions[i] for i in shots]
                recipes = self._recipes(seed, shots, lines, context, remembered)
                before, total = todo.index(shots) * settings.steps, len(todo) * settings.steps
                tell = teller(on_progress, before, total, f"keyframe {shots[-1] + 1} of {len(captions)}")
                images = [keep(i, recipe) if keep else None for i, recipe in zip(shots, recipes, strict=True)]
                if None in images:
                    drawn = self._draw(lines, context, layout, [seeded(seed, i) for i in shots], tell)
                    fresh = zip(drawn, recipes, strict=True)
                    drawn = [self.mark(new, recipe) for new, recipe in fresh] if self.mark else drawn
                    images = [had or new for had, new in zip(images, drawn, strict=True)]
            for i, image, recipe in zip(shots, images, recipes, strict=True):
                image = ImageOps.fit(image.convert("RGB"), (settings.width, settings.height))
                memory.append(Remembered(self, i, image, captions[i]))
                retriever.add(replace(moments[i], image=image))
                yield Keyframe(i, image, captions[i], remembered, recipe)

    def group(
        self, latents: Float[Tensor, "b p s c"], texts: list[Encoded], sigma: float, side: int, index: list[int]
    ) -> PairGroup:
        """One fold of pairs for the transformer, on its device and in its dtype; `texts` run over b, then p."""
        device, dtype = self.transformer.device, self.transformer.dtype
        folds = [rearrange(list(x), "(b p) ... -> b p ...", p=len(index)) for x in zip(*texts, strict=True)]
        latents, states, pooled = (x.to(device, dtype) for x in (latents, *folds))
        ids = coordinates(side, self.side, self.settings.memory_extent).to(device)
        sigmas = torch.full(latents.shape[:2], sigma, device=device)
        return PairGroup(latents, states, pooled, sigmas, ids, torch.tensor(index))

    def _fresh(self, count: int) -> int:
        """Places of the finest level that so many new keyframes leave to no other."""
        return min(count, self.settings.memory_group)

    def _choose(self, retriever: Retriever, moments: list[Moment], now: int) -> list[int]:
        """Which of the earlier shots to remember, the most important first: the newest, and what is retrieved.

        Shots that are drawn together are asked in turn.
        """
        room = self.settings.memory_levels * self.settings.memory_group - self._fresh(len(moments))
        if not now or not room:
            return []
        return [*dict.fromkeys([now - 1, *ranked(retriever, moments, room)])][:room]

    def _layout(self, order: Sequence[int], count: int) -> Layout:
        """Of the remembered, which are of this order of importance, and what is drawn, which comes before them all."""
        settings, fresh = self.settings, self._fresh(count)
        levels = settings.memory_levels, settings.memory_group, settings.memory_ratio
        rank = (*(fresh + place for place in order), *reversed(range(fresh)))
        return Layout(len(rank), self.side, *levels, rank=rank)

    def _recipes(
        self,
        seed: int,
        shots: list[int],
        captions: list[str],
        context: list["Remembered"],
        remembered: list[tuple[int, int]],
    ) -> list[str]:
        """A digest of all that each keyframe depends on but the weights: where it is equal, so is the picture."""
        numbers = {key: value for key, value in asdict(self.settings).items() if key not in ("weights", "towers")}
        digest, facts = hashlib.blake2b(digest_size=16), [numbers, seed, shots, captions, remembered]
        digest.update(json.dumps([*facts, [old.caption for old in context]]).encode())
        for old in context:
            digest.update(old.image.tobytes())
        return [f"{digest.hexdigest()}-{i}" for i in shots]

    @torch.no_grad()
    def _draw(
        self,
        captions: list[str],
        memory: list["Remembered"],
        layout: Layout,
        generators: list[torch.Generator],
        on_step: OnStep,
    ) -> list[Image.Image]:
        """The next keyframes."""
        settings, shape = self.settings, (tokens(self.side), self.transformer.config["in_channels"])
        noise = torch.stack([torch.randn(shape, generator=own) for own in generators]).to(self.transformer.device)
        velocity = self.velocity_field(captions, memory, layout, generators[0])
        drawn = euler(velocity, noise, schedule(settings.steps, settings.shift), on_step)
        return [to_image(frame[None]) for frame in decode_tokens(self.vae, drawn, self.side)]

    @torch.no_grad()
    def velocity_field(
        self, captions: list[str], memory: list["Remembered"], layout: Layout, generator: torch.Generator
    ) -> Callable[[Tensor, float], Tensor]:
        """Velocity of new pairs "p s c" at a noise level, given what is remembered, which runs once, here.

        `layout` is of the remembered, in the order of time, and then of the new ones; the generator makes the noise of
        the remembered. With guidance > 1 empty captions run beside theirs, on the same cache.
        """
        settings = self.settings
        causal, scale, distilled = settings.mask == "causal", settings.guidance, settings.distilled_guidance
        groups, index = self._context(memory, layout, generator), [len(memory) + p for p in range(len(captions))]
        encode, forward = self.transformer.encode_context, self.transformer.forward_pairs
        cache = encode(groups, causal=causal, guidance=distilled) if groups else None
        texts = [self.text(line) for line in captions + [""] * (scale > 1)]
        texts += texts[-1:] * (len(captions) - 1) if scale > 1 else []

        @torch.no_grad()
        def velocity(x: Float[Tensor, "p s c"], sigma: float) -> Float[Tensor, "p s c"]:
            latents = repeat(x, "p s c -> b p s c", b=len(texts) // len(captions))
            out = forward([self.group(latents, texts, sigma, self.side, index)], causal, cache, distilled)[0].float()
            return out[0] if len(out) == 1 else out[1] + scale * (out[0] - out[1])

        return velocity

    def _context(self, memory: list["Remembered"], layout: Layout, generator: torch.Generator) -> list[PairGroup]:
        """Noisy context for the next keyframe, a group per level."""
        groups, sigma = [], self.settings.context_sigma
        for side, places in layout.by_level():
            if old := [i for i in places if i < len(memory)]:  # the last places are of what is drawn
                latents = torch.stack([memory[i].latents(side) for i in old])[None]
                noise = torch.randn(latents.shape, generator=generator).to(latents.device)
                noised = torch.lerp(latents, noise, sigma)
                groups.append(self.group(noised, [memory[i].text for i in old], sigma, side, old))
        return groups


def ranked(retriever: Retriever, moments: Sequence[Moment], room: int) -> list[int]:
    """The frames that so many moments need most, asked in turn, each frame once."""
    found = chain.from_iterable(zip_longest(*(retriever.rank(moment, room) for moment in moments)))
    return [i for i in dict.fromkeys(found) if i is not None][:room]


def make_retriever(
    settings: KeyframeSettings | VideoSettings,
    states: Callable[[str], Float[Tensor, "_t e"]],
    device: str = "cpu",
    seed: int = 0,
) -> Retriever:
    """The retriever that the settings name, `states` being T5's of a caption's own tokens.

    UserError if there is none, or its towers cannot be loaded.
    """
    makers: dict[str, Callable[[], Retriever]] = {
        "recency": Recency,
        "clip": lambda: ClipRetriever(settings.towers, device),
        "t5": lambda: T5Retriever(states),
        "random": lambda: Random(seed),
        "oracle": Oracle,
    }
    if settings.retrieval not in makers:
        raise UserError(f"there is no retrieval {settings.retrieval!r}; choose one of {', '.join(makers)}")
    return makers[settings.retrieval]()


@dataclass
class Remembered:
    """An earlier keyframe; its caption and each of its sizes are encoded once, when first needed."""

    planner: KeyframePlanner
    shot: int
    image: Image.Image
    caption: str
    _latents: dict[int, Float[Tensor, "_s c"]] = field(default_factory=dict)

    @cached_property
    def text(self) -> Encoded:
        """Its caption, encoded."""
        return self.planner.text(self.caption)

    def latents(self, side: int) -> Float[Tensor, "s c"]:
        """Its tokens at a level, `side` patches high."""
        if side not in self._latents:
            self._latents[side] = encode_frames(self.planner.vae, shrink(to_tensor(self.image), side))[0]
        return self._latents[side]


def seeded(seed: int, shot: int, kind: str = "keyframe") -> torch.Generator:
    """Randomness of one keyframe (or "shot"): on the CPU, so that every device draws the same film."""
    digest = hashlib.blake2b(f"{kind} {shot} of film {seed}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def teller(tell: Progress | None, before: int, total: int, message: str) -> OnStep:
    """`tell` for one of several runs of denoising steps, `before` steps being done; None if nobody is told."""
    return None if tell is None else lambda done: tell(before + done, total, message)
