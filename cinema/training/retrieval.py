"""The toy preset's retrieval towers: frames and descriptions that find each other, by open_clip's model and loss.

What is described is what a query says: names are replaced by looks (:func:`cinema.retrieval.describe`), since a look
belongs to its movie and not to a name.
"""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cinema.config import TOY
from cinema.files import write_json
from cinema.retrieval import describe
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_movie
from cinema.training.autoencoder import to_image, to_tensor
from cinema.training.config import Stage
from cinema.training.text import make_tokenizer, tokenize, vocabulary

WORDS = 40  # of a description: looks are longer than names
SAME = 4  # shots of a movie in a batch: their sets and casts are alike, so looks have to be told apart
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class Towers(CLIP):
    """open_clip's model, in whatever precision its parameters have."""

    def forward(self, frames: Float[Tensor, "n 3 h w"], words: Tensor) -> dict[str, Tensor]:
        """Unit vectors of frames and descriptions, and the scale of their products."""
        return super().forward(frames.to(self.logit_scale.dtype), words)


class RetrievalTask:
    """Keyframes and the descriptions of their shots find each other in a batch (Radford et al. 2021)."""

    def __init__(self, seed: int, init: str | None, **shape: Any) -> None:
        torch.manual_seed(seed)
        self.seed, self.tokenizer, self.criterion = seed, make_tokenizer(start=True), ClipLoss()
        self.tokenizer.model_max_length = WORDS
        self.told = json.loads((Path(init) / CONFIG).read_text())["model_cfg"] if init else small_towers(**shape)
        told = {key: value for key, value in self.told["text_cfg"].items() if key != "hf_tokenizer_name"}
        vision, text = CLIPVisionCfg(**self.told["vision_cfg"]), CLIPTextCfg(**told)
        self.model = Towers(self.told["embed_dim"], vision, text, output_dict=True)
        if init:
            self.model.load_state_dict(load_file(Path(init) / WEIGHTS))

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """open_clip's contrastive loss of the batch, and the share of frames that their description finds."""
        frames, words = self._batch(step, stage.batch)
        device = next(model.parameters()).device
        out = model(frames.to(device), words.to(device))
        loss = self.criterion(**{key: value.float() for key, value in out.items()})
        found = (out["text_features"] @ out["image_features"].T).argmax(1).cpu() == torch.arange(stage.batch)
        return loss, {"found": found.float().mean().item()}

    def save(self, folder: Path) -> None:
        """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads, with its tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        half = {key: value.bfloat16().contiguous() for key, value in self.model.state_dict().items()}
        save_file(half, folder / WEIGHTS)
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
        write_json(folder / CONFIG, {"model_cfg": self.told, "preprocess_cfg": preprocess})
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Frames of a fresh batch, and below in the order in which their descriptions find them."""
        frames, words = self._batch(10**7, 8)
        device = next(self.model.parameters()).device
        out = self.model(frames.to(device), words.to(device))
        found = (out["text_features"] @ out["image_features"].T).argmax(1).cpu()
        to_image(rearrange([frames, frames[found]], "row n c h w -> c (row h) (n w)")).save(path)

    def _batch(self, step: int, count: int) -> tuple[Float[Tensor, "n 3 h w"], Tensor]:
        """Shots of fresh movies and their descriptions: a function of (seed, step) alone."""
        rng, frames, lines = random.Random(f"{self.seed}/{step}"), [], []
        for i in range(-(-count // SAME)):
            movie = sample_movie(f"retrieval/{self.seed}/{step}/{i}", rng.randint(SAME, 3 * SAME), returns=True)
            story = movie.story()
            for shot in rng.sample(range(len(movie.shots)), SAME):
                frames.append(render(movie, movie.shots[shot], TOY.keyframes.height))
                lines.append(describe(story, story.shots[shot].caption))
        return to_tensor(frames[:count]), tokenize(self.tokenizer, lines[:count])


def small_towers(
    width: int = 80, depth: int = 4, words: int = 64, text_depth: int = 2, embed: int = 64
) -> dict[str, Any]:
    """open_clip's configuration of two towers with half a million parameters together."""
    vision = CLIPVisionCfg(layers=depth, width=width, head_width=20, patch_size=16, pool_type="avg")
    told = asdict(vision) | {"image_size": [TOY.keyframes.height, TOY.keyframes.width]}
    text = CLIPTextCfg(context_length=WORDS, vocab_size=len(vocabulary()), width=words, heads=4)
    more = {"layers": text_depth, "hf_tokenizer_name": ".", "pool_type": "eos", "eos_id": 1, "no_causal_mask": True}
    towers = {"vision_cfg": told, "text_cfg": asdict(text) | more}
    said = {name: {k: v for k, v in tower.items() if v is not None} for name, tower in towers.items()}
    return {"embed_dim": embed, **said}
