"""The toy preset's retrieval towers: frames and descriptions that find each other, by open_clip's model and loss.

What is described is what a query says: names are replaced by looks (:func:`cinema.retrieval.describe`), since a look
belongs to its movie and not to a name.
"""

import json
import random
from pathlib import Path

import torch
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
from cinema.training.autoencoder import to_tensor
from cinema.training.config import Stage
from cinema.training.loop import Task
from cinema.training.text import make_tokenizer, tokenize

WORDS = 40  # of a description: looks are longer than names
SAME = 4  # shots of a movie in a batch: their sets and casts are alike, so looks have to be told apart
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class Towers(CLIP):
    """open_clip's model, in whatever precision its parameters have."""

    def forward(self, frames: Float[Tensor, "n 3 h w"], words: Tensor) -> dict[str, Tensor]:
        """Unit vectors of frames and descriptions, and the scale of their products."""
        return super().forward(frames.to(self.logit_scale.dtype), words)


class RetrievalTask(Task):
    """Keyframes and the descriptions of their shots find each other in a batch (Radford et al. 2021)."""

    def build(self) -> Towers:
        """Two towers as their configuration says, or the shipped one's; it is kept as `told`."""
        self.tokenizer, self.criterion = make_tokenizer(start=True), ClipLoss()
        self.tokenizer.model_max_length = WORDS
        config = Path(self.init or TOY.keyframes.towers) / CONFIG
        self.told = json.loads(config.read_text())["model_cfg"] | self.shape
        text = {key: value for key, value in self.told["text_cfg"].items() if key != "hf_tokenizer_name"}
        vision = CLIPVisionCfg(**self.told["vision_cfg"])
        model = Towers(self.told["embed_dim"], vision, CLIPTextCfg(**text), output_dict=True)
        if self.init:
            model.load_state_dict(load_file(Path(self.init) / WEIGHTS))
        return model

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """open_clip's contrastive loss of the batch, and the share of frames that their description finds."""
        frames, words = self._batch(step, stage.batch)
        out = model(frames.to(self.device), words.to(self.device))
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
