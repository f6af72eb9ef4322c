"""Training the keyframe model: rectified flow over interleaved pairs, each with its own noise.

The newest pairs are full-size and learn; older ones sit at GoldenMem's coarser levels, nearly clean, and are only
remembered. Some full-size pairs are nearly clean as well, as context is at inference (noisy context, paper 4.2).
"""

import copy
import random
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from einops import rearrange
from jaxtyping import BFloat16, Bool, Float
from pydantic import DirectoryPath, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerFast, T5EncoderModel

from cinema.config import TOY, KeyframeSettings
from cinema.flow import add_noise, sample_sigma, velocity
from cinema.goldenmem import PATCH, Layout, coordinates, shrink
from cinema.keyframes import KeyframePlanner, TextEncoders, encode_frames
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, sample_movie
from cinema.training.autoencoder import save_sheet, to_tensor
from cinema.training.config import Stage
from cinema.training.stories import StoryTask, sample_shots, save_pipeline
from cinema.training.text import clip_text_tower, make_tokenizer, reading_error, tokenize
from cinema.transformer import InterleavedFluxTransformer, PairGroup


class KeyframeLearner(nn.Module):
    """What is trained: the interleaved transformer on windows of a story, and beside it a linear layer that reads,
    from the words half-way through the global blocks, how each character looks."""

    def __init__(self, transformer: InterleavedFluxTransformer, words: int, settings: KeyframeSettings) -> None:
        super().__init__()
        self.transformer, self.causal, self.extent = transformer, settings.mask == "causal", settings.memory_extent
        self.recalls = nn.Linear(transformer.inner_dim, words)

    def forward(
        self,
        latents: list[Float[Tensor, "b _p _s c"]],
        text: Float[Tensor, "b pairs t e"],
        pooled: Float[Tensor, "b pairs f"],
        sigma: Float[Tensor, "b pairs"],
        layout: Layout,
    ) -> tuple[Float[Tensor, "b _p _s c"], Float[Tensor, "b pairs t v"]]:
        """Velocities at the finest level of the layout, and logits of every word's look; `latents` go by level."""
        dtype, groups = self.transformer.proj_out.weight.dtype, []
        for noised, (side, pairs) in zip(latents, layout.by_level(), strict=True):
            ids, index = coordinates(side, layout.sides[-1], self.extent).to(noised.device), torch.tensor(pairs)
            words = text[:, pairs].to(dtype), pooled[:, pairs].to(dtype)
            groups.append(PairGroup(noised.to(dtype), *words, sigma[:, pairs], ids, index))
        blocks, kept = self.transformer.single_transformer_blocks, []
        with blocks[len(blocks) // 2 - 1].register_forward_hook(lambda _block, _told, out: kept.append(out[0])):
            velocities = self.transformer.forward_pairs(groups, self.causal)
        lengths = [text.shape[2] + 2 * side**2 for side in layout.sides]
        looks = torch.stack([pair[:, : text.shape[2]] for pair in kept[0].split(lengths, dim=1)], dim=1)  # text first
        return velocities[0].float(), self.recalls(looks).float()


@dataclass(kw_only=True)
class KeyframeTask(StoryTask):
    """Keyframe planning on toy stories."""

    clip: DirectoryPath  #: a trained CLIP, or its text half, which stays as it is
    t5: DirectoryPath  #: a trained T5, likewise
    movies: PositiveInt = 2000
    recall: float = 0.0  #: weight of `recall_error`; without it attention takes long to find a look by its name
    context = 0.35  # share of the newest pairs (the last one excepted) that are nearly clean context
    context_sigma = 0.25  # upper bound of the context's noise
    caption_dropout = 0.08  # share of captions left empty, for guidance
    memory: dict[str, Any] = field(default_factory=dict)  #: settings of the planner that are other than the preset's

    def build(self) -> KeyframeLearner:
        """A transformer, and the planner that it is to draw for."""
        self.settings = replace(TOY.keyframes, **self.memory)
        vae = AutoencoderKL.from_pretrained(self.vae, torch_dtype=torch.bfloat16).eval().requires_grad_(False)
        clip = clip_text_tower(AutoModel.from_pretrained(self.clip, torch_dtype=torch.float32)).eval()
        t5 = T5EncoderModel.from_pretrained(self.t5, torch_dtype=torch.float32).eval().requires_grad_(False)
        tokenizers = make_tokenizer(start=True), make_tokenizer(start=False)
        text = TextEncoders(tokenizers[0], clip, tokenizers[1], t5, self.settings.text_tokens)
        kind, where = InterleavedFluxTransformer, {"subfolder": "transformer", "torch_dtype": torch.float32}
        transformer = kind.from_pretrained(self.init, **where) if self.init else small_flux(**self.shape)
        self.planner = KeyframePlanner(transformer, vae, text, self.settings)
        self.sides = [side for side, _ in self._layout(self.shots, self.settings.memory_group).by_level()]
        self.stories = self.latents(vae, self.sides)
        return KeyframeLearner(transformer, len(tokenizers[1]), self.settings)

    def encode(self, movie: Movie) -> dict[str, BFloat16[Tensor, "m _s c"]]:
        """Every shot at each of GoldenMem's levels, by the level's short side in patches."""
        frames = to_tensor([render(movie, shot) for shot in movie.shots])
        sizes = {side: frames if side == self.sides[0] else shrink(frames, side) for side in self.sides}
        return {str(side): encode_frames(self.planner.vae, small).bfloat16() for side, small in sizes.items()}

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Mean squared velocity error of the pairs that learn, and `recall` times the error of the looks."""
        rng, noise_rng = random.Random(f"{self.seed}/{step}"), torch.Generator().manual_seed(step)
        layout = self._layout(stage.pairs, stage.group)
        captions, latents = self._windows(rng, stage, layout)
        sigma, learns = self._noise(stage, layout, noise_rng)
        noise = [torch.randn(x.shape, generator=noise_rng) for x in latents]
        pairs = [p for _, p in layout.by_level()]  # the finest level comes first, and it alone learns
        noised = [add_noise(x, n, sigma[:, p]) for x, n, p in zip(latents, noise, pairs, strict=True)]
        told = (x.to(self.device) for x in (*self._text(captions), sigma))
        predicted, looks = (x.cpu() for x in model([x.to(self.device) for x in noised], *told, layout))
        error, learns = predicted - velocity(latents[0], noise[0]), learns[:, pairs[0]]
        loss = (error.square().mean((2, 3)) * learns).sum() / learns.sum()
        recall, known = recall_error(looks, *recall_targets(self.planner.text.tokenizer_2, captions))
        figures = {"newest": error[:, -1].square().mean().item(), "recall": recall.item(), "known": known}
        return loss + self.recall * recall, figures

    def save(self, folder: Path) -> None:
        """Write a folder that stock `FluxPipeline.from_pretrained` loads, in bfloat16."""
        vae, text = self.planner.vae, self.planner.text
        parts = {name: getattr(text, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
        parts |= {"vae": vae, "transformer": self.model.transformer.stock()}
        save_pipeline(FluxPipeline, folder, self.settings.shift, **parts)

    def sample(self, path: Path, stage: Stage) -> None:
        """Held-out stories as the toy world draws them, each above the same story as this model plans it."""
        planner = replace(self.planner, transformer=copy.deepcopy(self.model.transformer).bfloat16())
        pictures = []
        for seed in range(4):
            movie = sample_movie(f"heldout/sample/{seed}", stage.pairs)
            pictures += [render(movie, shot, self.settings.height) for shot in movie.shots]
            pictures += [keyframe.image for keyframe in planner.plan(movie.story(), seed)]
        save_sheet(path, to_tensor(pictures), stage.pairs)

    def _layout(self, pairs: int, group: int | None) -> Layout:
        s = self.settings
        return Layout(pairs, s.height // PATCH, s.memory_levels, group or pairs, s.memory_ratio)

    def _windows(
        self, rng: random.Random, stage: Stage, layout: Layout
    ) -> tuple[list[list[str]], list[Float[Tensor, "b _p _s c"]]]:
        """Some shots of some movies, each told as a film of its own: captions, and latents by level."""
        captions, windows = [], []
        for _ in range(stage.batch):
            shots = sample_shots(rng, self.shots, stage.pairs)
            index = rng.randrange(self.movies)
            movie = self.movie(index)
            lines = replace(movie, shots=[movie.shots[i] for i in shots]).captions()
            captions.append(["" if rng.random() < self.caption_dropout else line for line in lines])
            levels = ((self.stories[index][str(side)], pairs) for side, pairs in layout.by_level())
            windows.append([latents[[shots[i] for i in pairs]] for latents, pairs in levels])
        return captions, [torch.stack(level).float() for level in zip(*windows, strict=True)]

    def _noise(
        self, stage: Stage, layout: Layout, generator: torch.Generator
    ) -> tuple[Float[Tensor, "b pairs"], Float[Tensor, "b pairs"]]:
        """Noise level of each pair, and 1 where it learns."""
        shape = (stage.batch, stage.pairs)
        sigma = sample_sigma(shape, generator, shift=self.shift)
        learns = torch.rand(shape, generator=generator) >= self.context
        learns[:, -1] = True
        learns &= torch.tensor(layout.sides) == layout.sides[-1]
        clean = torch.rand(shape, generator=generator) * self.context_sigma
        return torch.where(learns, sigma, clean), learns.float()

    @torch.no_grad()
    def _text(self, captions: list[list[str]]) -> tuple[Float[Tensor, "b p t e"], Float[Tensor, "b p f"]]:
        text, flat, p = self.planner.text, [line for lines in captions for line in lines], len(captions[0])
        states = text.text_encoder_2(tokenize(text.tokenizer_2, flat)).last_hidden_state
        pooled = text.text_encoder(tokenize(text.tokenizer, flat)).pooler_output
        return rearrange(states, "(b p) t e -> b p t e", p=p), rearrange(pooled, "(b p) f -> b p f", p=p)


def recall_targets(
    tokenizer: PreTrainedTokenizerFast, stories: list[list[str]]
) -> tuple[Bool[Tensor, "b p t v"], Bool[Tensor, "b p t"]]:
    """For every word of a clause about a character, the words of the look that this or an earlier caption tells.

    The second tensor is True for words of clauses that tell no look themselves: those can only remember it.
    """
    shape = (len(stories), len(stories[0]), tokenizer.model_max_length)
    target, remembers = torch.zeros(*shape, len(tokenizer), dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for b, captions in enumerate(stories):
        looks: dict[str, list[int]] = {}
        for p, caption in enumerate(captions):
            start = 0
            for clause in caption.split("."):
                told, _, look = clause.partition(":")
                tag, end = told.strip().split(" ")[0], start + len(tokenizer.tokenize(clause))
                if look:
                    looks[tag] = tokenizer(look, add_special_tokens=False).input_ids
                if tag in looks:
                    target[b, p, start:end, looks[tag]] = True
                    remembers[b, p, start:end] = not look
                start = end
    return target, remembers


def recall_error(
    logits: Float[Tensor, "b p t v"], target: Bool[Tensor, "b p t v"], remembers: Bool[Tensor, "b p t"]
) -> tuple[Float[Tensor, ""], float]:
    """Binary cross entropy of the looks, summed over the vocabulary; and the share of remembered looks that are exact.

    Attention has to find, by the name, a look that an earlier caption tells. The velocity's error alone rewards that
    only through many blocks and much noise; here the words are asked for it (ours, not the paper's).
    """
    told = target.any(-1)
    if not told.any():
        return logits.sum() * 0, 1.0
    error, exact = reading_error(logits[told], target[told])
    return error, exact[remembers[told]].float().mean().item() if remembers.any() else 1.0


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
