"""Training the video model: rectified flow over windows of shots, each shot with its own noise.

The first latent frame of most shots is nearly clean, as a keyframe is at inference: it conditions every shot of the
window and does not learn; the rest of the time it is drawn from the caption like everything else.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from einops import rearrange
from jaxtyping import BFloat16, Bool, Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from cinema.config import TOY
from cinema.errors import UserError
from cinema.files import atomic
from cinema.flow import add_noise, sample_sigma, velocity
from cinema.story import Story
from cinema.toyworld.draw import render
from cinema.toyworld.world import Movie, sample_movie
from cinema.training.config import Stage
from cinema.training.keyframes import _save_half
from cinema.training.stories import fingerprint
from cinema.training.video_autoencoder import clip_frames
from cinema.video import Animator, Window, encode_clips, global_caption, strides, window_velocity

SHARD = 25  # movies per file


class ClipStore:
    """Latents of toy movies' shots, drawn and encoded once; shard files appear whole, so a killed run goes on.

    Args:
        folder: where the shards are; each names the autoencoder that it belongs to, and the seed.
        vae: encodes the clips.
        movies, shots: how many movies there are, and shots in each.
    """

    def __init__(self, folder: Path, vae: AutoencoderKLLTXVideo, seed: int, movies: int, shots: int) -> None:
        self.folder, self.vae, self.seed, self.movies, self.shots = folder, vae, seed, movies, shots
        self.latents: BFloat16[Tensor, "n m s c"] = torch.cat([load_file(p)["clips"] for p in self._shards()])[:movies]

    def movie(self, index: int) -> Movie:
        """The facts of a movie of the store."""
        return sample_movie(f"video/{self.seed}/{index}", self.shots)

    def _shards(self) -> Iterator[Path]:
        key = fingerprint(self.vae, TOY.video.height, TOY.video.frames)
        for start in range(0, self.movies, SHARD):
            path = self.folder / f"clips-{key}-{self.seed}-{self.shots}-{start:06d}.safetensors"
            if not path.exists():
                films = torch.stack([self._encode(self.movie(i)) for i in range(start, start + SHARD)])
                with atomic(path) as part:
                    save_file({"clips": films}, part)
            yield path

    def _encode(self, movie: Movie) -> BFloat16[Tensor, "m s c"]:
        clips = (clip_frames(movie, shot, TOY.video.height, TOY.video.frames) for shot in movie.shots)
        return torch.cat([encode_clips(self.vae, clip[None]) for clip in clips]).to(torch.bfloat16).contiguous()


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
        keyframed: share of shots whose first latent frame is given.
        keyframe_sigma: upper bound of the given frames' noise.
        caption_dropout: share of windows without words, for guidance.
        shift: time shift of the training noise.
    """

    def __init__(
        self,
        seed: int,
        init: str | None,
        keyframes: str,
        vae: str,
        cache: str,
        movies: int = 400,
        shots: int = 8,
        keyframed: float = 0.9,
        keyframe_sigma: float = 0.05,
        caption_dropout: float = 0.05,
        shift: float = 1.5,
        **shape: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.seed, self.keyframed, self.keyframe_sigma = seed, keyframed, keyframe_sigma
        self.caption_dropout, self.shift, self.settings = caption_dropout, shift, TOY.video
        self.vae = AutoencoderKLLTXVideo.from_pretrained(vae, torch_dtype=torch.bfloat16).eval().requires_grad_(False)
        t5 = T5EncoderModel.from_pretrained(keyframes, subfolder="text_encoder_2", torch_dtype=torch.float32)
        self.t5 = t5.eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(keyframes, subfolder="tokenizer_2")
        shape = {"latent": self.vae.config["latent_channels"], "text": self.t5.config.d_model} | shape
        transformer = (
            LTXVideoTransformer3DModel.from_pretrained(init, subfolder="transformer", torch_dtype=torch.float32)
            if init
            else small_ltx(**shape)
        )
        self.model = VideoLearner(transformer)
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
        pipeline = LTXConditionPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.settings.shift),
            vae=self.vae,
            text_encoder=self.t5,
            tokenizer=self.tokenizer,
            transformer=self.model.transformer,
        )
        for name in ("vae", "text_encoder", "transformer"):
            _save_half(getattr(pipeline, name), folder / name)
        for name in ("scheduler", "tokenizer"):
            getattr(pipeline, name).save_pretrained(folder / name)
        pipeline.save_config(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Shots of unseen movies, five moments of each: as the toy world draws them, then as this model does."""
        animator = Animator(self.model.transformer, self.vae, self.t5, self.tokenizer, self.settings, TOY.tags)
        movie = sample_movie("sample/0", self.settings.window)
        keyframes = [render(movie, shot, self.settings.height) for shot in movie.shots]
        moments = [round(i * (self.settings.frames - 1) / 4) for i in range(5)]
        rows = []
        for index, frames in animator.animate(movie.story(), keyframes):
            truth = [
                render(movie, movie.shots[index], self.settings.height, i / (self.settings.frames - 1)) for i in moments
            ]
            rows += [truth, [frames[i] for i in moments]]
        path.parent.mkdir(parents=True, exist_ok=True)
        _sheet(rows).save(path)

    def _window(self, shots: int) -> Window:
        settings = self.settings
        return Window((settings.frames,) * shots, settings.height, settings.width, settings.fps, strides(self.vae))

    def _batch(
        self, rng: random.Random, stage: Stage
    ) -> tuple[Float[Tensor, "b s c"], Float[Tensor, "b n t e"], Bool[Tensor, "b n t"]]:
        """Windows of neighbouring shots: their tokens and their captions, the global one first."""
        lines, tokens = [], []
        if stage.pairs > self.store.shots:
            has = f"the films have {self.store.shots} shots"
            raise UserError(f"a stage of {stage.pairs} shots, but {has}; lower pairs or raise shots")
        for _ in range(stage.batch):
            index, start = rng.randrange(self.store.movies), rng.randint(0, self.store.shots - stage.pairs)
            captions = window_captions(self.store.movie(index).story(), start, stage.pairs)
            lines += [""] * len(captions) if rng.random() < self.caption_dropout else captions
            tokens.append(rearrange(self.store.latents[index, start : start + stage.pairs], "k s c -> (k s) c"))
        states, words = self._text(lines)
        n = stage.pairs + 1
        return (
            torch.stack(tokens).float(),
            rearrange(states, "(b n) t e -> b n t e", n=n),
            rearrange(words, "(b n) t -> b n t", n=n),
        )

    @torch.no_grad()
    def _text(self, captions: list[str]) -> tuple[Float[Tensor, "n t e"], Bool[Tensor, "n t"]]:
        found = self.tokenizer(
            captions, padding="max_length", max_length=self.settings.text_tokens, truncation=True, return_tensors="pt"
        )
        return self.t5(found.input_ids)[0], found.attention_mask.bool()

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
    width = heads * head_dim
    model = LTXVideoTransformer3DModel(
        in_channels=latent,
        out_channels=latent,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=width,
        num_layers=layers,
        caption_channels=text,
    )
    for name, parameter in model.named_parameters():
        if name.startswith("proj_out") or name.endswith("attn2.to_out.0.weight"):
            nn.init.zeros_(parameter)
        elif name == "time_embed.linear.weight":
            nn.init.normal_(parameter, std=0.02)
    return model


def _sheet(rows: list[list[Image.Image]]) -> Image.Image:
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    return sheet
