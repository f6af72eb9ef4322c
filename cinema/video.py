"""Video synthesis: keyframes become moving shots, several shots at once, on LTX-Video's transformer and VAE.

A window of shots is one sequence, so every shot sees every keyframe, the nearly clean first latent frame of its own
shot. Each has its own noise level, range of rope coordinates and caption, beside the window's global one (Long Context
Tuning, Guo et al. 2025, section 3).
Axes: `b` windows, `k` shots, `s` tokens of a window, `n t` captions and their tokens, `c` channels, `f y x` latents.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from cinema.config import Preset, VideoSettings
from cinema.errors import UserError
from cinema.flow import OnStep, euler, schedule
from cinema.keyframes import load_parts, rename, seeded, teller, to_image, to_tensor, tokenize, warn_if_cut
from cinema.progress import Progress
from cinema.story import Shot, Story

TIME = 8  # frames of a latent of LTX-Video; shots have 8 j + 1


@dataclass
class Window:
    """Shots that are synthesised together, as one sequence of tokens; UserError if latents cannot have its numbers."""

    frames: tuple[int, ...]  #: of every shot; a multiple of a latent's, and one
    height: int  #: pixels, a multiple of a latent's
    width: int  #: likewise
    fps: int  #: frames per second; rope counts time in seconds
    stride: tuple[int, int] = (TIME, 32)  #: frames and pixels of a latent; LTX-Video's, if not told
    grid: tuple[int, int] = field(init=False)  #: latent rows and columns
    sizes: list[int] = field(init=False)  #: tokens of every shot
    shot: Int[Tensor, "s"] = field(init=False)  #: the shot that each token belongs to
    first: Bool[Tensor, "s"] = field(init=False)  #: whether it is of a shot's first latent frame, its keyframe's

    def __post_init__(self) -> None:
        time, space = self.stride
        if not self.frames or any(n < 1 or (n - 1) % time for n in self.frames):
            raise UserError(f"shots of {self.frames} frames; a window needs at least one, of {time} j + 1 frames each")
        if self.height % space or self.width % space:
            raise UserError(f"frames of {self.height} x {self.width} pixels; both must be multiples of {space}")
        self.grid = self.height // space, self.width // space
        area = self.grid[0] * self.grid[1]
        self.sizes = [((n - 1) // time + 1) * area for n in self.frames]
        self.shot = torch.arange(len(self.frames)).repeat_interleave(torch.tensor(self.sizes))
        self.first = torch.cat([torch.arange(size) < area for size in self.sizes])

    @cached_property
    def coordinates(self) -> Float[Tensor, "3 s"]:
        """(seconds, y, x) of each token: stock LTX-Video's in each shot, and each shot starts where the last ended."""
        parts, start, (every, space) = [], 0, self.stride
        y, x = (torch.arange(n, dtype=torch.float32) * space for n in self.grid)
        for count in self.frames:
            time = (start + (torch.arange(0, count, every) + 1 - every).clamp(min=0)) / self.fps
            parts.append(torch.stack(torch.meshgrid(time, y, x, indexing="ij")).flatten(1))
            start += count
        return torch.cat(parts, dim=1)

    def caption_bias(self, words: Bool[Tensor, "b n t"]) -> Float[Tensor, "b s nt"]:
        """What is added to cross attention's scores: a token reads the global caption (the first) and its shot's own.

        `words` is False for padding. -10,000 hides, as in stock LTX-Video.
        """
        caption = torch.arange(words.shape[1], device=words.device) - 1
        own = (caption == -1) | (caption == self.shot.to(words.device)[:, None])  # s n
        seen = rearrange(words, "b n t -> b 1 n t") & rearrange(own, "s n -> s n 1")
        return rearrange((~seen).float() * -10_000, "b s n t -> b s (n t)")


def window_velocity(
    transformer: torch.nn.Module,
    tokens: Float[Tensor, "b s c"],
    sigma: Float[Tensor, "b s"],
    states: Float[Tensor, "b n t e"],
    words: Bool[Tensor, "b n t"],
    window: Window,
) -> Float[Tensor, "b s c"]:
    """Velocity of every token of a window: one call of the stock transformer.

    `states` are T5's of the global caption and of one caption per shot, `words` False where they are padding.
    Every token has its own noise level, as shots have, and the keyframe in a shot.
    """
    return transformer(
        hidden_states=tokens,
        encoder_hidden_states=rearrange(states, "b n t e -> b (n t) e"),
        timestep=sigma * 1000,
        encoder_attention_mask=window.caption_bias(words).to(tokens.dtype),
        video_coords=repeat(window.coordinates.to(tokens.device), "xyz s -> b xyz s", b=tokens.shape[0]),
        return_dict=False,
    )[0]


@torch.no_grad()
def encode_clips(vae: AutoencoderKLLTXVideo, clips: Float[Tensor, "b 3 frames h w"]) -> Float[Tensor, "b s c"]:
    """Clips (or single frames) in [-1, 1] → tokens of the transformer, normalised per channel, in float32."""
    latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = _statistics(vae)
    return (rearrange(latents, "b c f y x -> b (f y x) c") - mean) / std


@torch.no_grad()
def decode_clips(
    vae: AutoencoderKLLTXVideo, tokens: Float[Tensor, "b s c"], grid: tuple[int, int]
) -> Float[Tensor, "b 3 frames h w"]:
    """Undo `encode_clips`; `grid` is latent rows and columns."""
    mean, std = _statistics(vae)
    latents = rearrange(tokens.to(vae.device) * std + mean, "b (f y x) c -> b c f y x", y=grid[0], x=grid[1])
    time = latents.new_zeros(len(latents), dtype=vae.dtype) if vae.config["timestep_conditioning"] else None
    return vae.decode(latents.to(vae.dtype), time).sample.float()


def _statistics(vae: AutoencoderKLLTXVideo) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
    mean, std = vae.latents_mean.float().to(vae.device), vae.latents_std.float().to(vae.device)
    return mean, std / vae.config["scaling_factor"]


def shot_frames(shot: Shot, settings: VideoSettings) -> int:
    """Frames of a shot: its duration rounded to 8 j + 1; the preset's number if the story does not say.

    UserError if it lasts less than 5 frames, too short for LTX-Video's latents.
    """
    if "duration" not in shot.model_fields_set:
        return settings.frames
    wanted = shot.duration * settings.fps
    if wanted < (TIME + 1) / 2:
        short = f"a shot of {shot.duration:g} s is {wanted:.1f} frames: {shot.caption[:60]!r}"
        raise UserError(f"{short}; give it a duration of at least {(TIME + 1) / settings.fps:g} s")
    return TIME * max(1, round((wanted - 1) / TIME)) + 1


def global_caption(story: Story, shots: Sequence[Shot]) -> str:
    """What a window's shots share in words: the looks of the characters they name."""
    tags = {tag for shot in shots for tag in shot.tags}
    return " ".join(f"{c.tag}: {c.description}." for c in story.cast if c.tag in tags and c.description)


@dataclass
class Animator:
    """Turns keyframes into shots with the parts of an LTX pipeline; UserError if its latents do not fit them."""

    transformer: LTXVideoTransformer3DModel
    vae: AutoencoderKLLTXVideo
    text_encoder: T5EncoderModel
    tokenizer: Any
    settings: VideoSettings
    tags: tuple[str, ...] = ()  #: names that the weights know; any, if there are none

    def __post_init__(self) -> None:
        self.window([self.settings.frames])

    @classmethod
    def from_preset(cls, preset: Preset, device: str | torch.device = "cpu") -> "Animator":
        """Load the parts from `preset.video.weights`; UserError if nothing loadable is there."""
        parts = {"transformer": LTXVideoTransformer3DModel, "vae": AutoencoderKLLTXVideo}
        parts |= {"text_encoder": T5EncoderModel, "tokenizer": AutoTokenizer}
        transformer, vae, t5, tokenizer = load_parts(preset.video.weights, "video", preset.dtype, device, parts)
        return cls(transformer, vae, t5, tokenizer, preset.video, preset.tags)

    def animate(
        self,
        story: Story,
        keyframes: Sequence[Image.Image],
        seed: int = 0,
        on_progress: Progress | None = None,
        known: Collection[int] = (),
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """Yield (shot, its frames) in the order of the story, window after window; `known` shots are left out.

        A shot depends on its window (captions and keyframes of at most `settings.window` shots, counted from the
        start of the story) and on noise seeded by (seed, shot), so that a shot rendered again is the same.
        UserError if keyframes are missing or of another aspect, a shot is too short, or the cast is too large.
        """
        if len(keyframes) != len(story.shots):
            raise UserError(f"{story.title}: {len(keyframes)} keyframes for {len(story.shots)} shots; give one a shot")
        width, height = self.settings.width, self.settings.height
        for image in keyframes:
            if abs(image.width * height / (image.height * width) - 1) > 0.02:
                told = f"a keyframe of {image.width} x {image.height} pixels does not have the film's aspect"
                raise UserError(f"{told}, {width} x {height}; crop it first")
        lengths = [shot_frames(shot, self.settings) for shot in story.shots]
        size, steps, every = self.settings.window, self.settings.steps, range(len(lengths))
        windows = [every[i : i + size] for i in every[::size] if not set(every[i : i + size]) <= set(known)]
        for w, shots in enumerate(windows):
            message = f"shots {shots[0] + 1} to {shots[-1] + 1} of {len(lengths)}"
            tell = teller(on_progress, w * steps, len(windows) * steps, message)
            window = self.window([lengths[i] for i in shots])
            for i, tokens in zip(shots, self._draw(story, shots, window, keyframes, seed, tell), strict=True):
                if i not in known:
                    clip = decode_clips(self.vae, tokens[None], window.grid)
                    yield i, [to_image(frame) for frame in rearrange(clip, "1 c t h w -> t 1 c h w")]

    def window(self, frames: Sequence[int]) -> Window:
        """A window of shots of these lengths, at the size of the settings."""
        strides = self.vae.temporal_compression_ratio, self.vae.spatial_compression_ratio
        return Window(tuple(frames), self.settings.height, self.settings.width, self.settings.fps, strides)

    @torch.no_grad()
    def _draw(
        self, story: Story, shots: range, window: Window, keyframes: Sequence[Image.Image], seed: int, on_step: OnStep
    ) -> list[Float[Tensor, "_s c"]]:
        """Tokens of the window's shots, drawn together. With guidance > 1 empty captions run beside the real."""
        settings, model, size = self.settings, self.transformer, (self.settings.width, self.settings.height)
        first, told = window.first.to(model.device), [story.shots[i] for i in shots]
        shared = Shot.model_construct(caption=global_caption(story, told))
        captions = rename(story.model_copy(update={"shots": [shared, *told]}), self.tags)
        lines = [captions, [""] * len(captions)] if settings.guidance > 1 else [captions]
        states, words = (torch.stack(parts) for parts in zip(*map(self.encode_text, lines), strict=True))
        sized = (to_tensor(keyframes[i].resize(size, Image.Resampling.LANCZOS)) for i in shots)
        clean = torch.cat([encode_clips(self.vae, rearrange(x, "1 c h w -> 1 c 1 h w")) for x in sized], dim=1)
        shapes = [(1, tokens, clean.shape[2]) for tokens in window.sizes]
        noise = [torch.randn(s, generator=seeded(seed, i, "shot")) for s, i in zip(shapes, shots, strict=True)]
        start, clean = torch.cat(noise, dim=1).to(model.device), clean.to(model.device)  # 1 s c
        start[:, first] = torch.lerp(clean, start[:, first], settings.keyframe_sigma)

        def velocity(x: Float[Tensor, "1 s c"], sigma: float) -> Float[Tensor, "1 s c"]:
            tokens = repeat(x, "1 s c -> b s c", b=len(lines)).to(model.dtype)
            levels = repeat(torch.where(first, settings.keyframe_sigma, sigma), "s -> b s", b=len(lines))
            out = window_velocity(model, tokens, levels, states, words, window).float()
            out = out if len(lines) == 1 else torch.lerp(out[1:], out[:1], settings.guidance)
            return out.masked_fill(first[:, None], 0.0)  # keyframes stay

        drawn = euler(velocity, start, schedule(settings.steps, settings.shift), on_step)
        drawn[:, first] = clean
        return list(drawn[0].split(window.sizes))

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> tuple[Float[Tensor, "n t e"], Bool[Tensor, "n t"]]:
        """T5 states of captions, and which of their tokens are words; T5 sees the padding, as in stock LTX-Video."""
        length, device = self.settings.text_tokens, self.text_encoder.device
        warn_if_cut(self.tokenizer, max(captions, key=len), length)
        found = tokenize(self.tokenizer, captions, length).to(device)
        return self.text_encoder(found.input_ids)[0], found.attention_mask.bool()
