"""Training the video model: rectified flow over windows of shots, each shot with its own noise.

The first latent frame of most shots is nearly clean, as a keyframe is at inference: it conditions every shot of the
window and does not learn; the rest of the time it is drawn from the caption like everything else.
"""

import random
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from einops import rearrange
from jaxtyping import BFloat16, Bool, Float
from pydantic import DirectoryPath, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from cinema.config import TOY
from cinema.flow import add_noise, sample_sigma, velocity
from cinema.interleave import strided
from cinema.story import Story
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_movie
from cinema.training.autoencoder import clip_frames, save_sheet, to_tensor
from cinema.training.config import Stage
from cinema.training.stories import Cache, FilmTask, save_pipeline
from cinema.video import Animator, Window, encode_clips, global_caption, window_velocity


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


@dataclass(kw_only=True)
class VideoTask(FilmTask):
    """Video synthesis on toy stories; a stage's `pairs` are the shots of a window."""

    vae: DirectoryPath  #: of the trained video autoencoder, which stays as it is
    keyframes: DirectoryPath  #: a trained Flux pipeline, whose T5 is used as it is
    shots: PositiveInt = 8
    shift: PositiveFloat = 1.5
    kind = "video"
    keyframed = 0.9  # share of shots whose first latent frame is given
    keyframe_sigma = 0.05  # upper bound of the given frames' noise
    caption_dropout = 0.05  # share of windows without words, for guidance
    settings = TOY.video

    def build(self) -> VideoLearner:
        """A transformer on the latents of the autoencoder and the states of the T5, which are loaded first."""
        vae = AutoencoderKLLTXVideo.from_pretrained(self.vae, torch_dtype=torch.bfloat16).eval().requires_grad_(False)
        t5 = T5EncoderModel.from_pretrained(self.keyframes, subfolder="text_encoder_2", torch_dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(self.keyframes, subfolder="tokenizer_2")
        t5.eval().requires_grad_(False)
        latent, text = vae.config["latent_channels"], t5.config.d_model
        self.shape = {"in_channels": latent, "out_channels": latent, "caption_channels": text} | self.shape
        transformer = self.load(LTXVideoTransformer3DModel, "video/transformer", subfolder="transformer")
        for name, parameter in () if self.init else transformer.named_parameters():
            if name.startswith("proj_out") or name.endswith("attn2.to_out.0.weight"):
                nn.init.zeros_(parameter)  # a new one says nothing, and reads no words
            elif name == "time_embed.linear.weight":
                nn.init.normal_(parameter, std=0.02)  # and every block is near identity
        self.animator = Animator(transformer, vae, t5, tokenizer, self.settings, TOY.tags)
        self.clips = Cache(self.cache, self.toys, [vae], (self.settings.height, self.settings.frames), self.encode)
        return VideoLearner(transformer)

    def check(self, stage: Stage) -> None:
        """As in `Task`."""
        strided(random.Random(0), self.shots, stage.pairs, stride=1)

    def encode(self, film: int) -> dict[str, BFloat16[Tensor, "m _s c"]]:
        """Every shot's clip."""
        movie = self.toys.movie(film)
        clips = (clip_frames(movie, shot, self.settings.height, self.settings.frames) for shot in movie.shots)
        tokens = [encode_clips(self.animator.vae, clip[None]) for clip in clips]
        return {"clips": torch.cat(tokens).to(torch.bfloat16)}

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Mean squared velocity error of the tokens that learn."""
        rng, noise_rng = random.Random(f"{self.seed}/{step}"), torch.Generator().manual_seed(step)
        window = self.animator.window([self.settings.frames] * stage.pairs)
        tokens, states, words = self._batch(rng, stage)
        sigma, learns = self._noise(window, stage, noise_rng)
        noise = torch.randn(tokens.shape, generator=noise_rng)
        inputs = (add_noise(tokens, noise, sigma), sigma, states, words)
        predicted = model(*(x.to(self.device) for x in inputs), window)
        error = (predicted - velocity(tokens, noise).to(self.device)).square().mean(2)
        learns = learns.to(self.device)
        return (error * learns).sum() / learns.sum(), {"learning": learns.mean().item()}

    def save(self, folder: Path) -> None:
        """Write a folder that stock `LTXConditionPipeline.from_pretrained` loads, in bfloat16."""
        own = self.animator
        text = {"text_encoder": own.text_encoder, "tokenizer": own.tokenizer}
        save_pipeline(
            LTXConditionPipeline, folder, self.settings.shift, vae=own.vae, transformer=own.transformer, **text
        )

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Shots of unseen movies, five moments of each: as the toy world draws them, then as this model does."""
        movie = sample_movie("sample/0", self.settings.window)
        height, last = self.settings.height, self.settings.frames - 1
        moments, pictures = [round(i * last / 4) for i in range(5)], []
        keyframes = [render(movie, shot, height) for shot in movie.shots]
        for index, frames in self.animator.animate(movie.story(), keyframes):
            pictures += [render(movie, movie.shots[index], height, i / last) for i in moments]
            pictures += [frames[i] for i in moments]
        save_sheet(path, to_tensor(pictures), columns=5)

    def _batch(
        self, rng: random.Random, stage: Stage
    ) -> tuple[Float[Tensor, "b s c"], Float[Tensor, "b n t e"], Bool[Tensor, "b n t"]]:
        """Windows of neighbouring shots: their tokens and their captions, the global one first."""
        lines, tokens = [], []
        for _ in range(stage.batch):
            index, shots = rng.randrange(self.movies), strided(rng, self.shots, stage.pairs, stride=1)
            captions = window_captions(self.toys.movie(index).story(), shots[0], stage.pairs)
            lines += [""] * len(captions) if rng.random() < self.caption_dropout else captions
            (clips,) = self.clips.read(index, "clips")
            tokens.append(rearrange(clips[shots], "k s c -> (k s) c"))
        texts = self.animator.encode_text(lines)
        states, words = (rearrange(x, "(b n) ... -> b n ...", n=stage.pairs + 1) for x in texts)
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
