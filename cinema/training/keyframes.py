"""Training the keyframe model: rectified flow over interleaved pairs, each with its own noise.

The newest pairs are full-size and learn; older ones sit at GoldenMem's coarser levels, nearly clean, and are only
remembered. Some full-size pairs are nearly clean as well, as context is at inference (noisy context, paper 4.2).
"""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from jaxtyping import Bool, Float
from pydantic import DirectoryPath, NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from cinema.budget import Work, parameters, peak_bytes, transformer_config
from cinema.config import KeyframeSettings, preset
from cinema.flow import add_noise, sample_sigma, velocity
from cinema.goldenmem import PATCH, Layout, coordinates, levels, shrink
from cinema.interleave import Window, Windows
from cinema.keyframes import KeyframePlanner, TextEncoders, encode_frames, load_parts, seeded
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_movie
from cinema.training.autoencoder import save_sheet, to_tensor
from cinema.training.config import Share, Stage, TrainConfig
from cinema.training.loop import At
from cinema.training.stories import Cache, FilmTask, halved, noise_figures, processes, save_adapters, save_pipeline
from cinema.training.text import clip_text_tower, make_tokenizer, reading_error
from cinema.transformer import InterleavedFluxTransformer, PairGroup

PARTS = {"vae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}  # options, and their folders in a pipeline
TOKENIZERS = ("tokenizer", "tokenizer_2")
CHUNK = 8  # frames that are encoded together


class KeyframeLearner(nn.Module):
    """What is trained: the interleaved transformer on windows of a story, and beside it a linear layer that reads,
    from the words half-way through the global blocks, how each character looks."""

    def __init__(self, transformer: InterleavedFluxTransformer, words: int, settings: KeyframeSettings) -> None:
        super().__init__()
        self.transformer, self.settings = transformer, settings
        if words:
            self.recalls = nn.Linear(transformer.inner_dim, words)
            nn.init.zeros_(self.recalls.weight)  # it learns to read first, and then what it reads

    def forward(
        self,
        latents: list[Float[Tensor, "b _p _s c"]],
        text: Float[Tensor, "b pairs t e"],
        pooled: Float[Tensor, "b pairs f"],
        sigma: Float[Tensor, "b pairs"],
        layout: Layout,
        causal: bool = True,
    ) -> tuple[Float[Tensor, "b _p _s c"], Float[Tensor, "b pairs t v"] | None]:
        """Velocities at the finest level of the layout, and logits of every word's look; `latents` go by level."""
        dtype, groups = self.transformer.proj_out.weight.dtype, []
        for noised, (side, pairs) in zip(latents, layout.by_level(), strict=True):
            ids = coordinates(side, layout.sides[-1], self.settings.memory_extent).to(noised.device)
            words = text[:, pairs].to(dtype), pooled[:, pairs].to(dtype)
            groups.append(PairGroup(noised.to(dtype), *words, sigma[:, pairs], ids, torch.tensor(pairs)))
        forward, blocks, kept = self.transformer.forward_pairs, self.transformer.single_transformer_blocks, []
        if not hasattr(self, "recalls"):
            return forward(groups, causal, guidance=self.settings.distilled_guidance)[0].float(), None
        with blocks[len(blocks) // 2 - 1].register_forward_hook(lambda _block, _told, out: kept.append(out[0])):
            velocities = forward(groups, causal, guidance=self.settings.distilled_guidance)
        lengths = [text.shape[2] + 2 * side**2 for side in layout.sides]
        looks = torch.stack([pair[:, : text.shape[2]] for pair in kept[0].split(lengths, dim=1)], dim=1)  # text first
        return velocities[0].float(), self.recalls(looks).float()


@plain_dataclass
class Batch:
    """A part of a step's batch; `b` are its windows, `p` their pairs, and what is by level goes from fine to coarse."""

    latents: list[Float[Tensor, "b _p _s c"]]  #: noised
    target: Float[Tensor, "b _p s c"]  #: velocities at the finest level
    text: Float[Tensor, "b p t e"]
    pooled: Float[Tensor, "b p f"]
    sigma: Float[Tensor, "b p"]
    weight: Float[Tensor, "b _p"]  #: of every pair of the finest level in the mean over the whole step's batch
    looks: tuple[Bool[Tensor, "b p t v"], Bool[Tensor, "b p t"]] | None  #: of `recall_targets`, where recall is trained
    share: float  #: of these windows in the whole step's words about looks, 1 on average
    layout: Layout
    causal: bool


@dataclass(kw_only=True)
class KeyframeTask(FilmTask):
    """Keyframe planning on films. The parts of the pipeline that are not trained come from `init` if not named."""

    vae: DirectoryPath | None = None  #: a trained autoencoder, which stays as it is
    clip: DirectoryPath | None = None  #: a trained CLIP, or its text half, likewise
    t5: DirectoryPath | None = None  #: a trained T5, likewise
    movies: PositiveInt = 2000
    stride: PositiveInt = 3  #: longest step from a shot of a window to the next
    max_shared: Share = 0.75  #: share of its shots that a window may have from its film's window one epoch before
    recall: NonNegativeFloat = (
        0.0  #: weight of `recall_error`; without it attention takes long to find a look by its name
    )
    shuffled: Share = 0.0  #: share of steps whose memory is ranked by chance, as retrieval may, and not by recency
    context: Share = 0.35  #: share of the newest pairs (the last one excepted) that are nearly clean context
    context_sigma: Share = 0.25  #: upper bound of the context's noise
    context_dropout: Share = 0.0  #: share of windows whose context is nothing but noise
    caption_dropout: Share = 0.08  #: share of captions left empty, for guidance

    @classmethod
    def needed_bytes(cls, config: TrainConfig, processes: int = 1, sharded: bool = False) -> int:
        """As the budget counts it, for the largest stage; of models that start from weights."""
        told = config.options
        if not config.init:
            return 0
        settings = preset(told.get("preset", "toy")).remembering(**told.get("memory", {})).keyframes
        shape, side = transformer_config(config.init), settings.height // PATCH
        work = Work(recompute=bool(told.get("recompute")), device="cuda" if torch.cuda.is_available() else "cpu")
        work = replace(work, train="lora", rank=told["lora"]) if told.get("lora") else replace(work, train="full")
        work = replace(work, shards=processes if sharded else 1)
        sizes, most = levels(side, settings.memory_levels, settings.memory_ratio), 0
        for stage in config.stages:
            sides = [sizes[i // (stage.group or stage.pairs)] for i in range(stage.pairs)]
            windows = max(1, stage.batch // (config.accumulate * processes))
            most = max(most, peak_bytes(shape, sides * windows, settings.text_tokens, work))
        return most - bool(told.get("quantise")) * parameters(shape) // work.shards * 3 // 2  # half a byte for two

    def build(self) -> KeyframeLearner:
        """A transformer, and the planner that it is to draw for."""
        self.settings = self.chosen.keyframes
        if self.data and self.recall:
            raise ValueError("recall needs looks that are known word by word; leave it away with data")
        vae = self.part(AutoencoderKL, self.vae, "vae", "keyframe")
        clip = self.part(AutoModel if self.clip else CLIPTextModel, self.clip, "text_encoder", "keyframe")
        clip = clip_text_tower(clip).eval().requires_grad_(False) if self.clip else clip
        t5 = self.part(T5EncoderModel, self.t5, "text_encoder_2", "keyframe")
        named = [make_tokenizer(start=True), make_tokenizer(start=False)]
        if not (self.clip and self.t5):
            kinds = dict.fromkeys(TOKENIZERS, AutoTokenizer)
            named = load_parts(str(self.init), "keyframe", "float32", "cpu", kinds)
        self.text = TextEncoders(named[0], clip, named[1], t5, self.settings.text_tokens)
        transformer = self.transformer(InterleavedFluxTransformer, "keyframe", lambda: small_flux(**self.shape))
        self.planner = KeyframePlanner(transformer, vae, self.text, self.settings, self.chosen.tags)
        self.sides = levels(self.settings.height // PATCH, self.settings.memory_levels, self.settings.memory_ratio)
        self._streams = dict[int, Windows]()
        used: tuple[Any, ...] = vae, clip, t5
        told = (self.sides, self.settings.text_tokens, [sorted(tokenizer.get_vocab().items()) for tokenizer in named])
        for encoder in used:
            encoder.to(processes().device)
        self.latents = Cache(self.cache, self.films, used, told, self.encode, self.tell)
        for encoder in used:
            encoder.to("cpu")  # they are done, and the room is needed
        return KeyframeLearner(self.planner.transformer, len(named[1]) if self.recall else 0, self.settings)

    def encode(self, film: int) -> dict[str, Tensor]:
        """Every shot at each of GoldenMem's levels, by the level's short side in patches; every caption it may have."""
        frames, kept = self.films.frames(film, self.settings.height), defaultdict[str, list[Tensor]](list)
        for start in range(0, len(frames), CHUNK):
            pixels = to_tensor(frames[start : start + CHUNK])
            for side in self.sides:
                small = pixels if side == self.sides[0] else shrink(pixels, side)
                kept[str(side)] += encode_frames(self.planner.vae, small).bfloat16().cpu()
        for line in [*self.films.variants(film), ""]:
            for name, state in zip(("states", "pooled"), self.text(line), strict=True):
                kept[name].append(state.bfloat16().cpu())
        return {name: torch.stack(values) for name, values in kept.items()}

    def check(self, stage: Stage) -> None:
        """As in `Task`."""
        self.layout(stage, 0), self._windows(stage.pairs)
        super().check(stage)
        if self.data and stage.untold:
            raise ValueError("untold needs looks that are known word by word; leave it away with data")

    def batch(self, stage: Stage, at: At) -> Batch:
        """Windows of films, told and noised."""
        windows, layout = self._windows(stage.pairs), self.layout(stage, at.step)
        chosen = [windows[position] for position in at.all]
        rngs = [random.Random(f"{self.seed}/{position}") for position in at.all]
        captions = [self._tell(window, rng, stage.untold) for window, rng in zip(chosen, rngs, strict=True)]
        generators = [seeded(self.seed, position, "window") for position in at.all]
        noise = [self._noise(stage, layout, rng, own) for rng, own in zip(rngs, generators, strict=True)]
        sigma, learns = (torch.stack(x) for x in zip(*noise, strict=True))
        finest, looks, share = layout.by_level()[0][1], None, 1.0
        own = [position - at.position for position in at.own]
        read = [self._read(chosen[i], captions[i], layout) for i in own]
        data = [torch.stack(level) for level in zip(*(latents for latents, _, _ in read), strict=True)]
        drawn = [[torch.randn(level.shape[1:], generator=generators[i]) for level in data] for i in own]
        noises = [torch.stack(level) for level in zip(*drawn, strict=True)]
        places = [places for _, places in layout.by_level()]
        noised = [add_noise(x, n, sigma[own][:, p]) for x, n, p in zip(data, noises, places, strict=True)]
        told = torch.stack([states for _, states, _ in read]), torch.stack([pooled for _, _, pooled in read])
        weight = learns[:, finest] / learns[:, finest].sum() * at.parts
        if self.recall:
            casts, shown = [self.films.looks(window.film) for window in chosen], sigma <= self.context_sigma
            target, remembers = recall_targets(self.text.tokenizer_2, captions, casts, shown, self.settings.text_tokens)
            words = target.any(-1).sum((1, 2))
            looks, share = (target[own], remembers[own]), float(words[own].sum() / words.sum().clamp(min=1) * at.parts)
        causal = (stage.mask or self.settings.mask) == "causal"
        return Batch(noised, velocity(data[0], noises[0]), *told, sigma[own], weight[own], looks, share, layout, causal)

    def loss(
        self, model: nn.Module, stage: Stage, batch: Batch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Mean squared velocity error of the pairs that learn, and `recall` times the error of the looks."""
        given = (x.to(self.device) for x in (batch.text, batch.pooled, batch.sigma))
        predicted, read = model([x.to(self.device) for x in batch.latents], *given, batch.layout, batch.causal)
        errors = (predicted - batch.target.to(self.device)).square().mean((2, 3))  # b _p
        weight = batch.weight.to(self.device)
        figures = self._figures(errors.detach(), batch)
        loss = (errors * weight).sum()
        if read is not None and batch.looks:
            recall, known = recall_error(read, *(x.to(self.device) for x in batch.looks))
            loss, figures["recall"] = loss + self.recall * batch.share * recall, recall.detach()
            figures["known"] = torch.tensor(known)
        return loss, figures

    def ids(self, stage: Stage, at: At) -> str:
        """The films and shots of a batch."""
        windows = [self._windows(stage.pairs)[position] for position in at.own]
        return "; ".join(f"film {w.film}, shots {', '.join(map(str, w.shots))}" for w in windows)

    def save(self, folder: Path) -> None:
        """Write a folder that stock `FluxPipeline.from_pretrained` loads, or, of adapters, `load_lora_weights`."""
        if self.lora:
            save_adapters(FluxPipeline, folder, self.model.transformer)
            return
        parts = {name: getattr(self.text, name) for name in (*TOKENIZERS, "text_encoder", "text_encoder_2")}
        parts |= {"vae": self.planner.vae, "transformer": self.model.transformer.stock()}
        save_pipeline(FluxPipeline, folder, self.settings.shift, **parts)

    def sample(self, path: Path, stage: Stage) -> None:
        """Held-out stories as the toy world draws them, each above the same story as this model plans it."""
        own = {name: copy.deepcopy(getattr(self.text, name)) for name in TOKENIZERS}  # batches use the others meanwhile
        transformer = halved(self.model.transformer, self.device)
        planner = replace(self.planner, transformer=transformer, text=replace(self.text, **own))
        pictures = []
        for seed in range(4):
            movie = sample_movie(f"heldout/sample/{seed}", stage.pairs)
            pictures += [render(movie, shot, self.settings.height) for shot in movie.shots]
            pictures += [keyframe.image for keyframe in planner.plan(movie.story(), seed)]
        save_sheet(path, to_tensor(pictures), stage.pairs)

    def card(self) -> dict[str, str]:
        """As in `Task`."""
        adapters = f", adapters of rank {self.lora}" if self.lora else ""
        return super().card() | {"about": f"A keyframe planner: Flux with interleaved pairs{adapters}."}

    def _windows(self, pairs: int) -> Windows:
        if pairs not in self._streams:
            self._streams[pairs] = Windows(self.films.lengths, pairs, self.seed, self.stride, self.max_shared)
        return self._streams[pairs]

    def layout(self, stage: Stage, step: int) -> Layout:
        """Who sits at which level in this step: the newest first, or, for a share of the steps, by chance."""
        s, rng, pairs = self.settings, random.Random(f"{self.seed}/rank {step}"), stage.pairs
        rank = (*rng.sample(range(1, pairs), pairs - 1), 0) if rng.random() < self.shuffled else None
        return Layout(pairs, s.height // PATCH, s.memory_levels, stage.group or pairs, s.memory_ratio, rank)

    def _tell(self, window: Window, rng: random.Random, untold: float) -> list[str]:
        lines = self.films.captions(window.film, window.shots, described=rng.random() >= untold)
        return ["" if rng.random() < self.caption_dropout else line for line in lines]

    def _read(
        self, window: Window, captions: list[str], layout: Layout
    ) -> tuple[list[Float[Tensor, "_p _s c"]], Float[Tensor, "p t e"], Float[Tensor, "p f"]]:
        """A window's latents by level, and its captions' states, from the cache."""
        names = [str(side) for side, _ in layout.by_level()]
        *latents, states, pooled = self.latents.read(window.film, *names, "states", "pooled")
        lines = {line: i for i, line in enumerate([*self.films.variants(window.film), ""])}
        words, shots = [lines[line] for line in captions], torch.tensor(window.shots)
        data = [x[shots[places]].float() for x, (_, places) in zip(latents, layout.by_level(), strict=True)]
        return data, states[words].float(), pooled[words].float()

    def _noise(
        self, stage: Stage, layout: Layout, rng: random.Random, generator: torch.Generator
    ) -> tuple[Float[Tensor, "p"], Float[Tensor, "p"]]:
        """Noise level of each pair of a window, and 1 where it learns."""
        pairs, shared = stage.pairs, stage.shared_noise
        sigma = sample_sigma((1 if shared else pairs,), generator, shift=stage.shift or self.shift).expand(pairs)
        learns = torch.rand(pairs, generator=generator) >= (0.0 if shared else self.context)
        learns[-1] = True
        learns &= torch.tensor(layout.sides) == layout.sides[-1]
        clean = torch.rand(pairs, generator=generator) * self.context_sigma
        clean = torch.ones(pairs) if rng.random() < self.context_dropout else clean
        return torch.where(learns, sigma, clean), learns.float()

    def _figures(self, errors: Float[Tensor, "b _p"], batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The error by noise level, and by the pair's place from the newest on."""
        learns, errors = batch.weight > 0, errors.cpu()
        told = noise_figures(errors, batch.sigma[:, batch.layout.by_level()[0][1]], learns)
        places = range(1, 1 + min(4, errors.shape[1]))
        return told | {f"newest {i - 1}": errors[:, -i][learns[:, -i]].mean() for i in places}


def recall_targets(
    tokenizer: PreTrainedTokenizerFast,
    stories: list[list[str]],
    casts: Sequence[Mapping[str, str]],
    shown: Bool[Tensor, "b p"],
    length: int,
) -> tuple[Bool[Tensor, "b p t v"], Bool[Tensor, "b p t"]]:
    """For every word of a clause about a character, the words of its look, where that can be known.

    A look is known once a caption tells it, or names its character beside a picture that is `shown`. The second tensor
    is True for words of clauses that neither tell the look nor have the picture: those can only remember it.
    """
    shape = (len(stories), len(stories[0]), length)
    target, remembers = torch.zeros(*shape, len(tokenizer), dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for b, captions in enumerate(stories):
        known = set[str]()
        for p, caption in enumerate(captions):
            start = 0
            for clause in caption.split("."):
                tag, end = clause.strip().split(" ")[0], start + len(tokenizer.tokenize(clause))
                if now := tag in casts[b] and (":" in clause or bool(shown[b, p])):
                    known.add(tag)
                if tag in known:
                    look = tokenizer(casts[b][tag], add_special_tokens=False).input_ids
                    target[b, p, start:end, look] = True
                    remembers[b, p, start:end] = not now
                start = end
    return target, remembers


def recall_error(
    logits: Float[Tensor, "b p t v"], target: Bool[Tensor, "b p t v"], remembers: Bool[Tensor, "b p t"]
) -> tuple[Float[Tensor, ""], float]:
    """Binary cross entropy of looks, summed over the vocabulary; and which share of remembered ones is exact, or NaN.

    Attention has to find, by the name, a look that an earlier caption tells. The velocity's error alone rewards that
    only through many blocks and much noise; here the words are asked for it (ours, not the paper's).
    """
    told = target.any(-1)
    if not told.any():
        return logits.sum() * 0, math.nan
    error, exact = reading_error(logits[told], target[told])
    return error, exact[remembers[told]].float().mean().item() if remembers.any() else math.nan


def small_flux(
    double: int = 2, single: int = 7, heads: int = 4, head_dim: int = 48, text: int = 128
) -> InterleavedFluxTransformer:
    """A Flux with few parameters; modulations and output start at zero, so that every block starts as identity."""
    side = 2 * (head_dim // 6)  # of the rope's two axes in the picture
    # fmt: off
    model = InterleavedFluxTransformer(
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=text, pooled_projection_dim=text, guidance_embeds=False,
        axes_dims_rope=(head_dim - 2 * side, side, side),
    )
    # fmt: on
    for name, parameter in model.named_parameters():
        if ("norm" in name and "linear" in name) or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    return model
