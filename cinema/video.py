"""Video synthesis: keyframes become moving shots, several shots at once, on LTX-Video's transformer and VAE.

A window of shots is one sequence, so every shot sees every keyframe, the nearly clean first latent frame of its own
shot. Each has its own noise level, range of rope coordinates and caption, beside the window's global one (Long Context
Tuning, Guo et al. 2025, section 3). Keyframes of shots outside the window condition it, too, at GoldenMem's coarser
levels; and it begins with shots that the window before it ended with.
Axes: `b` windows, `k` shots, `s` tokens of a window, `n t` captions and their tokens, `c` channels, `f y x` latents.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
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
from cinema.goldenmem import PATCH, coordinates, levels, shrink
from cinema.keyframes import (
    load_parts,
    make_retriever,
    ranked,
    rename,
    seeded,
    teller,
    to_image,
    to_tensor,
    tokenize,
    warn_if_cut,
)
from cinema.progress import Progress
from cinema.retrieval import Moment, describe
from cinema.story import TAG, Shot, Story

TIME = 8  # frames of a latent of LTX-Video; shots have 8 j + 1


@dataclass
class Window:
    """Shots that are synthesised together, as one sequence of tokens; UserError if latents cannot have its numbers."""

    frames: tuple[int, ...]  #: of every shot; a multiple of a latent's, and one
    height: int  #: pixels, a multiple of a latent's
    width: int  #: likewise
    fps: int  #: frames per second; rope counts time in seconds
    stride: tuple[int, int] = (TIME, 32)  #: frames and pixels of a latent; LTX-Video's, if not told
    before: tuple[int, ...] = ()  #: latent rows of pictures that precede it, in order of time; they are twice as wide
    after: tuple[int, ...] = ()  #: likewise of pictures that follow it
    grid: tuple[int, int] = field(init=False)  #: latent rows and columns
    sizes: list[int] = field(init=False)  #: tokens of every shot
    outside: int = field(init=False)  #: tokens of the pictures, which come first in the sequence
    shot: Int[Tensor, "s"] = field(init=False)  #: the shot that each token belongs to, -1 for a picture outside
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
        self.outside = sum(map(picture_tokens, self.before + self.after))
        shot = torch.arange(len(self.frames)).repeat_interleave(torch.tensor(self.sizes))
        self.shot = F.pad(shot, (self.outside, 0), value=-1)
        first = torch.cat([torch.arange(size) < area for size in self.sizes])
        self.first = F.pad(first, (self.outside, 0), value=False)

    @cached_property
    def coordinates(self) -> Float[Tensor, "3 s"]:
        """(seconds, y, x) of each token: stock LTX-Video's in each shot, and each shot starts where the last ended.

        Pictures outside lie before and after it, each the time of a latent from the next, over the same extent.
        """
        parts, start, (every, space) = list[Tensor](), 0, self.stride
        places = [*range(-len(self.before), 0), *range(len(self.after))]
        for place, rows in zip(places, self.before + self.after, strict=True):
            seconds = (place * every + (place >= 0) * sum(self.frames)) / self.fps
            yx = space * coordinates(rows, self.grid[0])
            parts.append(F.pad(yx, (1, 0), value=seconds).T)
        y, x = (torch.arange(n, dtype=torch.float32) * space for n in self.grid)
        for count in self.frames:
            time = (start + (torch.arange(0, count, every) + 1 - every).clamp(min=0)) / self.fps
            parts.append(torch.stack(torch.meshgrid(time, y, x, indexing="ij")).flatten(1))
            start += count
        return torch.cat(parts, dim=1)

    def caption_bias(self, words: Bool[Tensor, "b n t"]) -> Float[Tensor, "b s nt"]:
        """What is added to cross attention's scores: a token reads the global caption (the first) and its shot's own.

        A picture outside reads all, as a stock condition does. `words` is False for padding. -10,000 hides, as there.
        """
        caption = torch.arange(words.shape[1], device=words.device) - 1
        shot = self.shot.to(words.device)[:, None]
        own = (caption == -1) | (caption == shot) | (shot == -1)  # s n
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


def picture_tokens(rows: int) -> int:
    """Tokens of a picture outside a window."""
    return 2 * rows * rows


def global_caption(looks: Mapping[str, str], captions: Sequence[str]) -> str:
    """What a window's shots share in words: the looks, by tag, of the characters that their captions name."""
    named = {tag for line in captions for tag in re.findall(TAG, line)}
    return " ".join(f"{tag}: {look}." for tag, look in looks.items() if tag in named and look)


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
        drawn: Mapping[int, Callable[[], list[Image.Image]]] | None = None,
        take: int = 0,
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """Yield (shot, its frames) in the order of the story, window after window, but those that are `drawn` already.

        A shot depends on its window: captions and keyframes of at most `settings.window` shots, counted from the start
        of the story; keyframes outside that it remembers; and, as windows overlap, the last shots of the window before,
        as `drawn` reads them. Noise is seeded by (seed, shot), so a shot rendered again is the same; another `take` has
        other noise. It sees all of its window that is drawn if windows overlap, since then weights know whole shots;
        else its neighbours run along with it, as when they were first drawn. UserError if keyframes are missing or of
        another aspect, a shot is too short, or the cast is too large.
        """
        settings, every = self.settings, range(len(story.shots))
        self._check(story, keyframes)
        for shot in story.shots:
            shot_frames(shot, settings)  # too short a one is found before the work
        fresh = settings.window - settings.overlap
        spans = [every[i : i + settings.window] for i in every[::fresh] if not i or i + settings.overlap < len(every)]
        done, ready = dict[int, list[Image.Image]](), drawn or {}
        todo = [shots for w, shots in enumerate(spans) if not {*shots[settings.overlap * (w > 0) :]} <= {*ready}]
        search = self._search(story, keyframes)
        for shots in todo:
            kept = shots[: settings.overlap] if shots[0] else shots[:0]
            message = f"shots {shots[len(kept)] + 1} to {shots[-1] + 1} of {len(every)}"
            tell = teller(on_progress, todo.index(shots) * settings.steps, len(todo) * settings.steps, message)
            seen = [i for i in shots if i in kept or (take and settings.overlap and i in ready)]
            given = {i: ready[i]() if i in ready else done[i] for i in seen}
            conditions = self._conditions(story, shots, keyframes, given, search)
            kinds = [f"take {take} of shot" if take and i not in ready else "shot" for i in shots]
            for i, own in zip(shots, self._sample(story, shots, conditions, seed, kinds, tell), strict=True):
                if i not in kept and i not in ready:
                    clip = decode_clips(self.vae, own[None], conditions[0].grid)
                    done[i] = [to_image(frame) for frame in rearrange(clip, "1 c t h w -> t 1 c h w")]
                    yield i, done[i]
            done = {i: frames for i, frames in done.items() if i > shots[-1] - settings.overlap}

    def window(self, frames: Sequence[int], before: Sequence[int] = (), after: Sequence[int] = ()) -> Window:
        """A window of shots of these lengths, and of pictures outside of so many latent rows, at the settings' size."""
        size, strides = (self.settings.height, self.settings.width), self._strides
        return Window(tuple(frames), *size, self.settings.fps, strides, tuple(before), tuple(after))

    @property
    def levels(self) -> tuple[int, ...]:
        """Latent rows of pictures outside a window: GoldenMem's levels but the finest, which is the window's own."""
        settings = self.settings
        return levels(settings.height // self._strides[1], settings.memory_levels, settings.memory_ratio)[1:]

    def encode_picture(self, picture: Image.Image, rows: int | None = None) -> Float[Tensor, "1 s c"]:
        """Tokens of a keyframe at the film's size, or shrunk in pixel space to so many latent rows."""
        size = self.settings.width, self.settings.height
        pixels = to_tensor(picture.resize(size, Image.Resampling.LANCZOS))
        small = pixels if rows is None else shrink(pixels, rows * self._strides[1] // PATCH)
        return encode_clips(self.vae, rearrange(small, "1 c h w -> 1 c 1 h w"))

    @property
    def _strides(self) -> tuple[int, int]:
        return self.vae.temporal_compression_ratio, self.vae.spatial_compression_ratio

    def _check(self, story: Story, keyframes: Sequence[Image.Image]) -> None:
        if len(keyframes) != len(story.shots):
            raise UserError(f"{story.title}: {len(keyframes)} keyframes for {len(story.shots)} shots; give one a shot")
        width, height = self.settings.width, self.settings.height
        for image in keyframes:
            if abs(image.width * height / (image.height * width) - 1) > 0.02:
                told = f"a keyframe of {image.width} x {image.height} pixels does not have the film's aspect"
                raise UserError(f"{told}, {width} x {height}; crop it first")

    def _search(self, story: Story, keyframes: Sequence[Image.Image]) -> Callable[[range], list[int]]:
        """Who tells, for the shots of a window, which others they need most: the nearest, or what retrieval finds."""
        near = self.settings.retrieval == "recency"
        asked = [Moment(shot, describe(story, shot.caption)) for shot in story.shots]
        retriever = make_retriever(self.settings, self._states, str(self.transformer.device))
        for moment, keyframe in zip(asked, keyframes, strict=True) if self.levels and not near else ():
            retriever.add(replace(moment, image=keyframe))

        def search(shots: range) -> list[int]:
            found = [*range(len(asked))] if near else ranked(retriever, [asked[i] for i in shots], len(asked))
            found.sort(key=lambda i: min(abs(i - j) for j in shots) if near else 0)
            return [i for i in found if i not in shots][: len(self.levels) * self.settings.memory_group]

        return search

    def _states(self, caption: str) -> Float[Tensor, "t e"]:
        states, words = self.encode_text([caption])
        return states[0][words[0]]

    def _conditions(
        self,
        story: Story,
        shots: range,
        keyframes: Sequence[Image.Image],
        given: Mapping[int, list[Image.Image]],
        search: Callable[[range], list[int]],
    ) -> tuple[Window, Float[Tensor, "1 s c"], Bool[Tensor, "s"]]:
        """A window, its tokens as far as they are known, and which are; of `given` shots all are."""
        order, group = search(shots), self.settings.memory_group
        seen = dict(sorted((i, self.levels[rank // group]) for rank, i in enumerate(order)))  # in order of time
        sides = ([rows for i, rows in seen.items() if (i < shots[0]) == early] for early in (True, False))
        window = self.window([shot_frames(story.shots[i], self.settings) for i in shots], *sides)
        parts = [self.encode_picture(keyframes[i], rows) for i, rows in seen.items()]
        for i, size in zip(shots, window.sizes, strict=True):
            if i in given:
                clip = rearrange([to_tensor(frame) for frame in given[i]], "t 1 c h w -> 1 c t h w")
            known = encode_clips(self.vae, clip) if i in given else self.encode_picture(keyframes[i])
            parts.append(F.pad(known, (0, 0, 0, size - known.shape[1])))
        whole = torch.tensor([i in given for i in shots] + [True])  # the last place is -1's, of pictures outside
        return window, torch.cat(parts, dim=1), window.first | whole[window.shot]

    @torch.no_grad()
    def _sample(
        self,
        story: Story,
        shots: range,
        conditions: tuple[Window, Float[Tensor, "1 s c"], Bool[Tensor, "s"]],
        seed: int,
        kinds: Sequence[str],
        on_step: OnStep,
    ) -> list[Float[Tensor, "_s c"]]:
        """Tokens of the window's shots, drawn together. With guidance > 1 empty captions run beside the real."""
        settings, model, (window, clean, given) = self.settings, self.transformer, conditions
        told = [story.shots[i] for i in shots]
        looks = {character.tag: character.description for character in story.cast}
        shared = Shot.model_construct(caption=global_caption(looks, [shot.caption for shot in told]))
        captions = rename(story.model_copy(update={"shots": [shared, *told]}), self.tags)
        lines = [captions, [""] * len(captions)] if settings.guidance > 1 else [captions]
        texts = zip(*map(self.encode_text, lines), strict=True)
        states, words = (torch.stack(parts).to(model.device) for parts in texts)
        sizes, seeds = [window.outside, *window.sizes], [(shots[0], "outside"), *zip(shots, kinds, strict=True)]
        shapes = [(1, tokens, clean.shape[2]) for tokens in sizes]
        noise = [torch.randn(shape, generator=seeded(seed, *own)) for shape, own in zip(shapes, seeds, strict=True)]
        start, clean, given = torch.cat(noise, dim=1).to(model.device), clean.to(model.device), given.to(model.device)
        start[:, given] = torch.lerp(clean, start, settings.keyframe_sigma)[:, given]

        def velocity(x: Float[Tensor, "1 s c"], sigma: float) -> Float[Tensor, "1 s c"]:
            tokens = repeat(x, "1 s c -> b s c", b=len(lines)).to(model.dtype)
            levels = repeat(torch.where(given, settings.keyframe_sigma, sigma), "s -> b s", b=len(lines))
            out = window_velocity(model, tokens, levels, states, words, window).float()
            out = out if len(lines) == 1 else torch.lerp(out[1:], out[:1], settings.guidance)
            return out.masked_fill(given[:, None], 0.0)  # what is given stays

        drawn = euler(velocity, start, schedule(settings.steps, settings.shift), on_step)
        drawn[:, given] = clean[:, given]
        return list(drawn[0].split(sizes))[1:]

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> tuple[Float[Tensor, "n t e"], Bool[Tensor, "n t"]]:
        """T5 states of captions, and which of their tokens are words; T5 sees the padding, as in stock LTX-Video."""
        length, device = self.settings.text_tokens, self.text_encoder.device
        warn_if_cut(self.tokenizer, max(captions, key=len), length)
        found = tokenize(self.tokenizer, captions, length).to(device)
        return self.text_encoder(found.input_ids)[0], found.attention_mask.bool()
