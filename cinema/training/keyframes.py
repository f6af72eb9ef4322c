"""Training the keyframe model: rectified flow over interleaved pairs, each with its own noise.

The newest pairs are full-size and learn; older ones sit at GoldenMem's coarser levels, nearly clean, and are only
remembered. Some full-size pairs are nearly clean as well, as context is at inference (noisy context, paper 4.2).
"""

import copy
import random
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel, T5EncoderModel

from cinema.config import TOY
from cinema.flow import add_noise, sample_sigma, velocity
from cinema.goldenmem import PATCH, Layout, coordinates
from cinema.keyframes import KeyframePlanner, TextEncoders
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_movie
from cinema.training.autoencoder import to_image, to_tensor
from cinema.training.config import Stage
from cinema.training.stories import StoryStore, sample_shots
from cinema.training.text import clip_text_tower, make_tokenizer, tokenize
from cinema.transformer import InterleavedFluxTransformer, PairGroup

EMPTY = ""


class KeyframeLearner(nn.Module):
    """What is trained: the interleaved transformer, called on windows of a story."""

    def __init__(self, transformer: InterleavedFluxTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        latents: list[Float[Tensor, "b _p _s c"]],
        text: Float[Tensor, "b pairs t e"],
        pooled: Float[Tensor, "b pairs f"],
        sigma: Float[Tensor, "b pairs"],
        layout: Layout,
    ) -> list[Float[Tensor, "b _p _s c"]]:
        """Velocities of the noised latents, one tensor per level of the layout."""
        dtype, groups = self.transformer.proj_out.weight.dtype, []
        for noised, (side, pairs) in zip(latents, layout.by_level(), strict=True):
            groups.append(
                PairGroup(
                    latents=noised.to(dtype),
                    text=text[:, pairs].to(dtype),
                    pooled=pooled[:, pairs].to(dtype),
                    sigma=sigma[:, pairs],
                    ids=coordinates(side, layout.sides[-1]).to(noised.device),
                    index=torch.tensor(pairs),
                )
            )
        return [v.float() for v in self.transformer.forward_pairs(groups, causal=True)]


class KeyframeTask:
    """Keyframe planning on toy stories.

    Args:
        vae, clip, t5: folders of the trained autoencoder, CLIP and T5, which stay as they are.
        cache: folder for the encoded stories.
        movies, shots: size of the training set.
        context: share of the newest pairs (the last one excepted) that are nearly clean context.
        context_sigma: upper bound of the context's noise.
        caption_dropout: share of captions left empty, for guidance.
        shift: time shift of the training noise.
    """

    def __init__(
        self,
        seed: int,
        init: str | None,
        vae: str,
        clip: str,
        t5: str,
        cache: str,
        movies: int = 2000,
        shots: int = 12,
        context: float = 0.35,
        context_sigma: float = 0.25,
        caption_dropout: float = 0.08,
        shift: float = 4.0,
        **shape: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.seed, self.context, self.context_sigma = seed, context, context_sigma
        self.caption_dropout, self.shift = caption_dropout, shift
        self.settings = TOY.keyframes
        self.vae = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.bfloat16).eval().requires_grad_(False)
        self.clip = clip_text_tower(CLIPModel.from_pretrained(clip)).eval().requires_grad_(False)
        self.clip_tokenizer, self.t5_tokenizer = make_tokenizer(start=True), make_tokenizer(start=False)
        self.t5 = T5EncoderModel.from_pretrained(t5, torch_dtype=torch.float32).eval().requires_grad_(False)
        self.model = KeyframeLearner(self._transformer(init) if init else small_flux(**shape))
        sides = tuple(side for side, _ in self._layout(shots, self.settings.memory_group).by_level())
        self.store = StoryStore(Path(cache), self.vae, seed, movies, shots, sides)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Mean squared velocity error of the pairs that learn."""
        rng, noise_rng = random.Random(f"{self.seed}/{step}"), torch.Generator().manual_seed(step)
        layout = self._layout(stage.pairs, stage.group)
        captions, latents = self._windows(rng, stage, layout)
        sigma, learns = self._noise(stage, layout, noise_rng)
        noise = [torch.randn(x.shape, generator=noise_rng) for x in latents]
        pairs = [p for _, p in layout.by_level()]
        noised = [add_noise(x, n, sigma[:, p]) for x, n, p in zip(latents, noise, pairs, strict=True)]
        text, pooled = self._text(captions)
        device = next(model.parameters()).device
        told = (x.to(device) for x in (text, pooled, sigma))
        predicted = [v.cpu() for v in model([x.to(device) for x in noised], *told, layout)]
        error, count = torch.zeros(()), 0
        for v, x, n, p in zip(predicted, latents, noise, pairs, strict=True):
            per_pair = (v - velocity(x, n)).square().mean((2, 3))
            error, count = error + (per_pair * learns[:, p]).sum(), count + int(learns[:, p].sum())
        newest = predicted[0][:, -1] - velocity(latents[0][:, -1], noise[0][:, -1])  # the finest level comes first
        return error / count, {"newest": newest.square().mean().item()}

    def save(self, folder: Path) -> None:
        """Write a folder that stock `FluxPipeline.from_pretrained` loads, in bfloat16."""
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.settings.shift),
            vae=self.vae,
            text_encoder=self.clip,
            tokenizer=self.clip_tokenizer,  # type: ignore[arg-type]
            text_encoder_2=self.t5,
            tokenizer_2=self.t5_tokenizer,
            transformer=self.model.transformer.stock(),
        )
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                _save_half(part, folder / name)
            elif part is not None:
                part.save_pretrained(folder / name)
        pipeline.save_config(folder)

    def sample(self, path: Path, stage: Stage) -> None:
        """Held-out stories as the toy world draws them, each above the same story as this model plans it."""
        half = copy.deepcopy(self.model.transformer).bfloat16()
        text = TextEncoders(self.clip_tokenizer, self.clip, self.t5_tokenizer, self.t5, self.settings.text_tokens)
        planner = KeyframePlanner(half, self.vae, text, self.settings)
        rows = []
        for seed in range(4):
            movie = sample_movie(f"heldout/sample/{seed}", stage.pairs)
            rows.append([render(movie, shot, self.settings.height) for shot in movie.shots])
            rows.append([keyframe.image for keyframe in planner.plan(movie.story(), seed)])
        path.parent.mkdir(parents=True, exist_ok=True)
        to_image(torch.cat([torch.cat(list(to_tensor(row)), 2) for row in rows], 1)).save(path)

    def _layout(self, pairs: int, group: int | None = None) -> Layout:
        s = self.settings
        return Layout(pairs, s.height // PATCH, s.memory_levels, group or pairs, s.memory_ratio)

    def _windows(self, rng: random.Random, stage: Stage, layout: Layout) -> tuple[list[list[str]], list[Tensor]]:
        captions, levels = [], []
        for _ in range(stage.batch):
            shots = sample_shots(rng, self.store.shots, stage.pairs)
            lines, latents = self.store.window(rng.randrange(self.store.movies), shots)
            captions.append([EMPTY if rng.random() < self.caption_dropout else line for line in lines])
            levels.append([latents[side][pairs] for side, pairs in layout.by_level()])
        return captions, [torch.stack(level).float() for level in zip(*levels, strict=True)]

    def _noise(
        self, stage: Stage, layout: Layout, generator: torch.Generator
    ) -> tuple[Float[Tensor, "b pairs"], Float[Tensor, "b pairs"]]:
        shape = (stage.batch, stage.pairs)
        sigma = sample_sigma(shape, generator, shift=self.shift)
        learns = torch.rand(shape, generator=generator) >= self.context
        learns[:, -1] = True
        learns &= torch.tensor(layout.sides) == layout.sides[-1]
        clean = torch.rand(shape, generator=generator) * self.context_sigma
        return torch.where(learns, sigma, clean), learns.float()

    @torch.no_grad()
    def _text(self, captions: list[list[str]]) -> tuple[Float[Tensor, "b p t e"], Float[Tensor, "b p f"]]:
        flat = [line for lines in captions for line in lines]
        states = self.t5(tokenize(self.t5_tokenizer, flat)).last_hidden_state
        pooled = self.clip(tokenize(self.clip_tokenizer, flat)).pooler_output
        p = len(captions[0])
        return rearrange(states, "(b p) t e -> b p t e", p=p), rearrange(pooled, "(b p) f -> b p f", p=p)

    @staticmethod
    def _transformer(folder: str) -> InterleavedFluxTransformer:
        full = {"torch_dtype": torch.float32}
        return InterleavedFluxTransformer.from_pretrained(folder, subfolder="transformer", **full)


def small_flux(
    double: int = 2, single: int = 7, heads: int = 4, head_dim: int = 48, text: int = 128
) -> InterleavedFluxTransformer:
    """A Flux with few parameters; modulations and output start at zero, so that every block starts as identity."""
    axis = head_dim // 3
    model = InterleavedFluxTransformer(
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=text,
        pooled_projection_dim=text,
        guidance_embeds=False,
        axes_dims_rope=(axis, axis, axis),
    )
    for name, parameter in model.named_parameters():
        if ("norm" in name and "linear" in name) or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    return model


def _save_half(module: nn.Module, folder: Path) -> None:
    """Write a module in bfloat16 and leave it as it is."""
    copy.deepcopy(module).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
