"""Training the video model: rectified flow over windows of shots, each shot with its own noise.

The first latent frame of most shots is nearly clean, as a keyframe is at inference: it conditions every shot of the
window and does not learn; the rest of the time it is drawn from the caption like everything else.
"""

import random
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from cinema.config import TOY
from cinema.errors import UserError
from cinema.flow import add_noise, sample_sigma, velocity
from cinema.story import Story
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, sample_movie
from cinema.training.autoencoder import sheet
from cinema.training.config import Stage
from cinema.training.stories import fingerprint, load_shards, save_pipeline
from cinema.training.video_autoencoder import clip_frames
from cinema.video import Animator, Window, encode_clips, global_caption, window_velocity

SHARD = 25  # movies per file


class ClipStore:
    """`movies` toy movies of `shots` shots and their latents "n m s c", encoded once and kept in `folder`."""

    def __init__(self, folder: Path, vae: AutoencoderKLLTXVideo, seed: int, movies: int, shots: int) -> None:
        self.vae, self.seed, self.movies, self.shots = vae, seed, movies, shots
        stem = folder / f"clips-{fingerprint(vae, TOY.video.height, TOY.video.frames)}-{seed}-{shots}"
        self.latents = load_shards(stem, movies, SHARD, self._encode)["clips"]

    def movie(self, index: int) -> Movie:
        """The facts of a movie of the store."""
        return sample_movie(f"video/{self.seed}/{index}", self.shots)

    def _encode(self, indices: range) -> dict[str, Tensor]:
        shots = [(movie, shot) for movie in map(self.movie, indices) for shot in movie.shots]
        clips = (clip_frames(movie, shot, TOY.video.height, TOY.video.frames) for movie, shot in shots)
        tokens = torch.cat([encode_clips(self.vae, clip[None]) for clip in clips]).to(torch.bfloat16)
        return {"clips": rearrange(tokens, "(n m) s c -> n m s c", m=self.shots).contiguous()}


class VideoLearner(nn.Module):
    """What is trained: the stock transformer, called on windows."""

    def __init__(self, transformer: LTXVideoTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        tokens: Float[Tensor, "b s c"],
        sigma: Float[Tensor, "b s"],
        states: Float[Tensor, "b n t e"],
        words: Bool[Tensor, "b n t"],
        window: Window,
    ) -> Float[Tensor, "b s c"]:
        """Velocities of the noised tokens, in float32."""
        dtype = self.transformer.proj_in.weight.dtype
        return window_velocity(self.transformer, tokens.to(dtype), sigma, states.to(dtype), words, window).float()


class VideoTask:
    """Video synthesis on toy stories; a stage's `pairs` are the shots of a window.

    Args:
        keyframes: folder of the trained Flux pipeline, whose T5 is used as it is.
        vae: folder of the trained video autoencoder.
        cache: folder for the encoded clips.
        movies, shots: size of the training set.
        shift: time shift of the training noise.
    """

    keyframed = 0.9  # share of shots whose first latent frame is given
    keyframe_sigma = 0.05  # upper bound of the given frames' noise
    caption_dropout = 0.05  # share of windows without words, for guidance
    settings = TOY.video

    def __init__(
        self,
        seed: int,
        init: str | None,
        keyframes: str,
        vae: str,
        cache: str,
        movies: int = 400,
        shots: int = 8,
        shift: float = 1.5,
        **shape: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.seed, self.shift = seed, shift
        full: dict[str, Any] = {"torch_dtype": torch.float32}
        self.vae = AutoencoderKLLTXVideo.from_pretrained(vae, torch_dtype=torch.bfloat16).eval().requires_grad_(False)
        t5 = T5EncoderModel.from_pretrained(keyframes, subfolder="text_encoder_2", **full).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(keyframes, subfolder="tokenizer_2")
        shape = {"latent": self.vae.config["latent_channels"], "text": t5.config.d_model} | shape
        kind = LTXVideoTransformer3DModel
        transformer = kind.from_pretrained(init, subfolder="transformer", **full) if init else small_ltx(**shape)
        self.model = VideoLearner(transformer)
        self.animator = Animator(transformer, self.vae, t5, tokenizer, self.settings, TOY.tags)
        self.store = ClipStore(Path(cache), self.vae, seed, movies, shots)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Mean squared velocity error of the tokens that learn."""
        rng, noise_rng = random.Random(f"{self.seed}/{step}"), torch.Generator().manual_seed(step)
        window = self._window(stage.pairs)
        tokens, states, words = self._batch(rng, stage)
        sigma, learns = self._noise(window, stage, noise_rng)
        noise = torch.randn(tokens.shape, generator=noise_rng)
        device = next(model.parameters()).device
        inputs = (add_noise(tokens, noise, sigma), sigma, states, words)
        predicted = model(*(x.to(device) for x in inputs), window)
        error = (predicted - velocity(tokens, noise).to(device)).square().mean(2)
        learns = learns.to(device)
        return (error * learns).sum() / learns.sum(), {"learning": learns.mean().item()}

    def save(self, folder: Path) -> None:
        """Write a folder that stock `LTXConditionPipeline.from_pretrained` loads, in bfloat16."""
        text = {"text_encoder": self.animator.text_encoder, "tokenizer": self.animator.tokenizer}
        parts = {"vae": self.vae, "transformer": self.model.transformer, **text}
        save_pipeline(LTXConditionPipeline, folder, self.settings.shift, **parts)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Shots of unseen movies, five moments of each: as the toy world draws them, then as this model does."""
        movie = sample_movie("sample/0", self.settings.window)
        height, last = self.settings.height, self.settings.frames - 1
        moments, rows = [round(i * last / 4) for i in range(5)], []
        keyframes = [render(movie, shot, height) for shot in movie.shots]
        for index, frames in self.animator.animate(movie.story(), keyframes):
            rows.append([render(movie, movie.shots[index], height, i / last) for i in moments])
            rows.append([frames[i] for i in moments])
        sheet(rows).save(path)

    def _window(self, shots: int) -> Window:
        return self.animator.window([self.settings.frames] * shots)

    def _batch(
        self, rng: random.Random, stage: Stage
    ) -> tuple[Float[Tensor, "b s c"], Float[Tensor, "b n t e"], Bool[Tensor, "b n t"]]:
        """Windows of neighbouring shots: their tokens and their captions, the global one first."""
        store, count, lines, tokens = self.store, stage.pairs, [], []
        if count > store.shots:
            has = f"the films have {store.shots} shots"
            raise UserError(f"a stage of {count} shots, but {has}; lower pairs or raise shots")
        for _ in range(stage.batch):
            index, start = rng.randrange(store.movies), rng.randint(0, store.shots - count)
            captions = window_captions(store.movie(index).story(), start, count)
            lines += [""] * len(captions) if rng.random() < self.caption_dropout else captions
            tokens.append(rearrange(store.latents[index, start : start + count], "k s c -> (k s) c"))
        states, words = (rearrange(x, "(b n) ... -> b n ...", n=count + 1) for x in self.animator.encode_text(lines))
        return torch.stack(tokens).float(), states, words

    def _noise(
        self, window: Window, stage: Stage, generator: torch.Generator
    ) -> tuple[Float[Tensor, "b s"], Float[Tensor, "b s"]]:
        """Noise level of each token, and 1 where it learns."""
        shape = (stage.batch, stage.pairs)
        sigma = sample_sigma(shape, generator, shift=self.shift)[:, window.shot]
        given = (torch.rand(shape, generator=generator) < self.keyframed)[:, window.shot] & window.first
        clean = (torch.rand(shape, generator=generator) * self.keyframe_sigma)[:, window.shot]
        return torch.where(given, clean, sigma), (~given).float()


def window_captions(story: Story, start: int, count: int) -> list[str]:
    """Captions of a window as the animator tells them: the global one, then each shot's own."""
    shots = story.shots[start : start + count]
    return [global_caption(story, shots), *(shot.caption for shot in shots)]


def small_ltx(
    latent: int = 128, text: int = 128, heads: int = 4, head_dim: int = 48, layers: int = 4
) -> LTXVideoTransformer3DModel:
    """An LTX-Video transformer with few parameters; every block starts near identity and the output at zero."""
    # fmt: off
    model = LTXVideoTransformer3DModel(
        in_channels=latent, out_channels=latent, num_attention_heads=heads, attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim, num_layers=layers, caption_channels=text,
    )
    # fmt: on
    for name, parameter in model.named_parameters():
        if name.startswith("proj_out") or name.endswith("attn2.to_out.0.weight"):
            nn.init.zeros_(parameter)
        elif name == "time_embed.linear.weight":
            nn.init.normal_(parameter, std=0.02)
    return model
