"""Training the video model: rectified flow over windows of shots, each shot with its own noise.

What conditions is nearly clean, as at inference, and does not learn: the first latent frame of a shot, which is its
keyframe; keyframes of shots outside the window, at GoldenMem's coarser levels; whole shots that a window begins with. A
stage says how often it is there; the rest is drawn from the captions.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from einops import rearrange
from jaxtyping import Bool, Float
from pydantic import DirectoryPath, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from cinema.config import Preset, preset
from cinema.errors import UserError
from cinema.flow import add_noise, sample_sigma, velocity
from cinema.keyframes import seeded
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_movie
from cinema.training.autoencoder import save_sheet, to_tensor
from cinema.training.config import Share, Stage
from cinema.training.loop import At
from cinema.training.stories import Cache, FilmTask, halved, noise_figures, processes, save_adapters, save_pipeline
from cinema.video import Animator, Window, encode_clips, global_caption, window_velocity

TEXT = {"text_encoder": T5EncoderModel, "tokenizer": AutoTokenizer}  # of a pipeline


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


@plain_dataclass
class Batch:
    """A part of a step's batch, `b` windows of one layout."""

    tokens: Float[Tensor, "b s c"]  #: noised
    target: Float[Tensor, "b s c"]  #: velocities
    sigma: Float[Tensor, "b s"]
    states: Float[Tensor, "b n t e"]
    words: Bool[Tensor, "b n t"]
    weight: Float[Tensor, "b s"]  #: of every token in the mean over the whole step's batch
    window: Window


@dataclass(kw_only=True)
class VideoTask(FilmTask):
    """Video synthesis on films; a stage's `pairs` are the shots of a window."""

    vae: DirectoryPath | None = None  #: a trained video autoencoder, which stays as it is
    keyframes: DirectoryPath | None = None  #: a trained Flux pipeline, whose T5 is used as it is
    shots: PositiveInt = 8
    shift: PositiveFloat = 1.5
    keyframe_sigma: Share = 0.05  #: upper bound of the noise on what conditions
    caption_dropout: Share = 0.05  #: share of windows without words, for guidance
    kind = "video"

    @property
    def chosen(self) -> Preset:
        """As in `FilmTask`."""
        known = preset(self.preset)
        return replace(known, video=replace(known.video, **self.memory))

    @property
    def seconds(self) -> float:
        """As in `FilmTask`."""
        return self.chosen.video.frames / self.chosen.video.fps

    def build(self) -> VideoLearner:
        """A transformer on the latents of the autoencoder and the states of the T5, which are loaded first."""
        self.settings, self._places = self.chosen.video, lru_cache(maxsize=4096)(self._every_line)
        vae = self.part(AutoencoderKLLTXVideo, self.vae, "vae", "video")
        if self.keyframes:
            t5 = self.part(T5EncoderModel, self.keyframes / "text_encoder_2", "", "")
            tokenizer = AutoTokenizer.from_pretrained(self.keyframes / "tokenizer_2")
        else:
            t5, tokenizer = (self.part(kind, None, n, "video") for n, kind in TEXT.items())
        transformer = self.transformer(LTXVideoTransformer3DModel, "video", lambda: self._new(vae, t5))
        self.animator = Animator(transformer, vae, t5, tokenizer, self.settings, self.chosen.tags)
        facts = (self.settings, self.animator.levels, sorted(tokenizer.get_vocab().items()))
        for encoder in (vae, t5):
            encoder.to(processes().device)
        self.latents = Cache(self.cache, self.films, [vae, t5], facts, self.encode, self.tell)
        for encoder in (vae, t5):
            encoder.to("cpu")  # they are done, and the room is needed
        return VideoLearner(self.animator.transformer)

    def _new(self, vae: AutoencoderKLLTXVideo, t5: T5EncoderModel) -> LTXVideoTransformer3DModel:
        """A transformer that says nothing, reads no words, and of which every block is near identity."""
        latent = vae.config["latent_channels"]
        self.shape = {"in_channels": latent, "out_channels": latent, "caption_channels": t5.config.d_model} | self.shape
        made = self.load(LTXVideoTransformer3DModel, "video/transformer")
        for name, parameter in made.named_parameters():
            if name.startswith("proj_out") or name.endswith("attn2.to_out.0.weight"):
                nn.init.zeros_(parameter)
            elif name == "time_embed.linear.weight":
                nn.init.normal_(parameter, std=0.02)
        return made

    def check(self, stage: Stage) -> None:
        """As in `Task`."""
        longest, most = max(self.films.lengths), self.settings.window
        if stage.pairs > min(longest, most):
            raise UserError(f"{stage.pairs} shots, but a window has {most} at most and the longest film {longest}")
        if stage.given.outside and not self.animator.levels:
            raise ValueError("keyframes outside need levels; set options.memory.memory_levels to 2 or more")
        if stage.untold:
            raise ValueError("untold is of keyframe models; leave it away")
        super().check(stage)

    def lines(self, film: int, shots: range, every: Sequence[str] = ()) -> list[str]:
        """Captions of a window as the animator tells them: the global one, then each shot's own, of `every` caption."""
        own = (every or self.films.captions(film, range(self.films.lengths[film])))[shots.start : shots.stop]
        return [global_caption(self.films.looks(film), own), *own]

    def encode(self, film: int) -> dict[str, Tensor]:
        """Every shot's clip, its first frame at each level by latent rows, and all lines that windows may have."""
        size, kept = self.settings, defaultdict[str, list[Tensor]](list)
        clips = self.films.clips(film, size.height, size.frames, size.fps)
        for frames in clips:
            clip = rearrange(to_tensor(frames), "t c h w -> 1 c t h w")
            kept["clips"].append(encode_clips(self.animator.vae, clip)[0])
            for rows in self.animator.levels:
                kept[str(rows)].append(self.animator.encode_picture(frames[0], rows)[0])
        kept["states"], kept["words"] = (list(x) for x in self.animator.encode_text([*self._places(film)]))
        return {k: torch.stack(x).to("cpu", torch.bfloat16 if k != "words" else torch.bool) for k, x in kept.items()}

    def batch(self, stage: Stage, at: At) -> Batch:
        """Windows of films, with what conditions them, told and noised."""
        places, window = self._layout(stage, random.Random(f"{self.seed}/layout {at.step}"))
        generators = [seeded(self.seed, position, "window") for position in at.all]
        noise = [self._noise(stage, window, own) for own in generators]
        sigma, learns = (torch.stack(x) for x in zip(*noise, strict=True))
        own = [position - at.position for position in at.own]
        read = [self._read(stage, window, places, position) for position in at.own]
        data, states, words = (torch.stack(x) for x in zip(*read, strict=True))
        drawn = torch.stack([torch.randn(data.shape[1:], generator=generators[i]) for i in own])
        weight = learns[own] / learns.sum() * at.parts
        noised = add_noise(data, drawn, sigma[own])
        return Batch(noised, velocity(data, drawn), sigma[own], states, words, weight, window)

    def loss(self, model: nn.Module, stage: Stage, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Mean squared velocity error of the tokens that learn."""
        inputs = (batch.tokens, batch.sigma, batch.states, batch.words)
        predicted = model(*(x.to(self.device) for x in inputs), batch.window)
        errors = (predicted - batch.target.to(self.device)).square().mean(2)  # b s
        return (errors * batch.weight.to(self.device)).sum(), noise_figures(errors, batch.sigma, batch.weight > 0)

    def save(self, folder: Path) -> None:
        """Write a folder that stock `LTXConditionPipeline` loads, or, of adapters, its `load_lora_weights`."""
        own = self.animator
        if self.lora:
            save_adapters(LTXConditionPipeline, folder, own.transformer)
            return
        parts = {"text_encoder": own.text_encoder, "tokenizer": own.tokenizer}
        parts |= {"vae": own.vae, "transformer": own.transformer}
        save_pipeline(LTXConditionPipeline, folder, self.settings.shift, **parts)

    def card(self) -> dict[str, str]:
        """As in `Task`."""
        return super().card() | {"about": "Video synthesis from keyframes: LTX-Video on windows of shots."}

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Shots of unseen movies, five moments of each: as the toy world draws them, then as this model does."""
        movie = sample_movie("sample/0", self.settings.window)
        height, last = self.settings.height, self.settings.frames - 1
        moments, pictures = [round(i * last / 4) for i in range(5)], []
        keyframes = [render(movie, shot, height) for shot in movie.shots]
        animator = replace(self.animator, transformer=halved(self.animator.transformer, self.device))
        for index, frames in animator.animate(movie.story(), keyframes):
            pictures += [render(movie, movie.shots[index], height, i / last) for i in moments]
            pictures += [frames[i] for i in moments]
        save_sheet(path, to_tensor(pictures), columns=5)

    def _every_line(self, film: int) -> dict[str, int]:
        """Every line that a window of this film may have, and its place in the cache."""
        length, most = self.films.lengths[film], self.settings.window
        spans = [range(i, i + n) for n in range(1, most + 1) for i in range(length - n + 1)]
        every = self.films.captions(film, range(length))
        lines = {line: None for span in spans for line in self.lines(film, span, every)} | {"": None}
        return {line: i for i, line in enumerate(lines)}

    def _layout(self, stage: Stage, rng: random.Random) -> tuple[int, Window]:
        """How many keyframes precede a step's windows, and what these look like, with the pictures outside."""
        sizes = [rows for rows in self.animator.levels for _ in range(self.settings.memory_group)]
        room = min(len(sizes), max(self.films.lengths) - stage.pairs)
        count = rng.randint(1, room) if room and rng.random() < stage.given.outside else 0
        before, order = rng.randint(0, count), rng.sample(sizes[:count], count)
        frames = [self.settings.frames] * stage.pairs
        return before, self.animator.window(frames, order[:before], order[before:])

    def _read(
        self, stage: Stage, window: Window, before: int, position: int
    ) -> tuple[Float[Tensor, "s c"], Float[Tensor, "n t e"], Bool[Tensor, "n t"]]:
        """Tokens of the window at a position of the stream, and its lines, from the cache."""
        rng, outside = random.Random(f"{self.seed}/{position}"), [*window.before, *window.after]
        fits = [i for i, length in enumerate(self.films.lengths) if length >= stage.pairs + len(outside)]
        film = rng.choice(fits)
        start = rng.randint(before, self.films.lengths[film] - stage.pairs - len(window.after))
        shots, later = range(start, start + stage.pairs), range(start + stage.pairs, self.films.lengths[film])
        seen = sorted(rng.sample(range(start), before)) + sorted(rng.sample(later, len(window.after)))
        told = self.lines(film, shots) if rng.random() >= self.caption_dropout else [""] * (stage.pairs + 1)
        names = ["clips", "states", "words", *dict.fromkeys(map(str, outside))]
        kept = dict(zip(names, self.latents.read(film, *names), strict=True))
        places, own = self._places(film), rearrange(kept["clips"][shots.start : shots.stop], "k s c -> (k s) c")
        rows = [places[line] for line in told]
        pictures = [kept[str(side)][shot] for side, shot in zip(outside, seen, strict=True)]
        return torch.cat([*pictures, own]).float(), kept["states"][rows].float(), kept["words"][rows]

    def _noise(
        self, stage: Stage, window: Window, generator: torch.Generator
    ) -> tuple[Float[Tensor, "s"], Float[Tensor, "s"]]:
        """Noise level of each token of a window, and 1 where it learns."""
        given = stage.given
        chance = torch.rand(stage.pairs + 2, generator=generator)
        whole = 1 + int(chance[-2] * (stage.pairs - 1)) if chance[-1] < given.shots and stage.pairs > 1 else 0
        clean = torch.rand(stage.pairs + 1, generator=generator) * self.keyframe_sigma  # the last place is outside's
        sigma = sample_sigma((stage.pairs,), generator, shift=stage.shift or self.shift)
        keyframed = torch.cat([chance[:-2] < given.keyframes, torch.tensor([False])])
        known = (window.first & keyframed[window.shot]) | (window.shot < whole)  # -1 is outside
        return torch.where(known, clean[window.shot], sigma[window.shot]), (~known).float()
