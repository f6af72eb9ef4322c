"""Text encoders of the toy preset: tokenizers over the shot list's words, a small T5, a small CLIP, retrieval towers.

CLIP and the towers are trained by contrast, with captions and with descriptions, in which names are replaced by looks
(:func:`cinema.retrieval.describe`). T5's encoder is trained to bind: every word learns its clause, and so whose colour
a colour is.
"""

import json
import random
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from cinema.config import TOY
from cinema.files import write_json
from cinema.retrieval import describe
from cinema.toyworld.draw import render
from cinema.toyworld.world import ACTIONS, CAMERAS, COLOURS, HATS, PLACES, POSITIONS, SHAPES, SIZES, sample_movie
from cinema.training.autoencoder import frames_of_step, to_tensor
from cinema.training.config import Stage
from cinema.training.loop import Task

PAD, END, START, UNKNOWN = "<|pad|>", "<|end|>", "<|start|>", "<|unknown|>"
WORDS = 40  # of a description: looks are longer than names
SAME = 4  # shots of a movie in a batch: their sets and casts are alike, so looks have to be told apart
SETTINGS, TOWERS = "open_clip_config.json", "open_clip_model.safetensors"


def vocabulary() -> list[str]:
    """Every word of the shot list, then single characters, so that any text can be spelled."""
    words = [*SIZES, *PLACES, *POSITIONS, *ACTIONS, *COLOURS, *SHAPES, *HATS, *" ".join(CAMERAS).split(), "shot"]
    letters = ascii_lowercase + digits + "<>-_'"
    pieces = [*TOY.tags, *words, *letters, *(f"##{x}" for x in letters)]
    return list(dict.fromkeys([PAD, END, START, UNKNOWN, *pieces]))


def make_tokenizer(start: bool) -> PreTrainedTokenizerFast:
    """A word-piece tokenizer that drops punctuation and case; T5 has no start token, CLIP has one."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    core = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=64))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[.,:;!?]"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece()
    special, single = [(t, ids[t]) for t in (START, END)], f"{START} $A {END}" if start else f"$A {END}"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    names = {"pad_token": PAD, "eos_token": END, "bos_token": START, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=TOY.keyframes.text_tokens, **names)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Int[Tensor, "n t"]:
    """Token ids, padded to the tokenizer's length and cut there, as the Flux pipeline does it."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def shot_captions(seed: int, step: int, count: int) -> list[str]:
    """Captions of second and first shots of fresh movies; a function of (seed, step) alone."""
    movies = [sample_movie(f"captions/{seed}/{step}/{i}", 2) for i in range(count)]
    return [movie.captions()[i % 2] for i, movie in enumerate(movies)]


def clause_targets(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Bool[Tensor, "n t v"]:
    """For every word of a caption, the words of its clause; nothing for padding and the end."""
    target = torch.zeros(len(captions), tokenizer.model_max_length, len(tokenizer), dtype=torch.bool)
    for row, caption in zip(target, captions, strict=True):
        start = 0
        for clause in caption.split("."):
            ids = tokenizer(clause, add_special_tokens=False).input_ids
            row[start : start + len(ids), ids] = True
            start += len(ids)
    return target


class ClauseReader(nn.Module):
    """What is trained: a T5 encoder, and a linear layer that reads from each word's state which words belong to it."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.belongs = nn.Linear(encoder.config.d_model, encoder.config.vocab_size)

    def forward(self, words: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        """Logits, for every word, of every word of the vocabulary to stand in the same clause."""
        return self.belongs(self.encoder(words).last_hidden_state)


def reading_error(
    logits: Float[Tensor, "n v"], target: Bool[Tensor, "n v"]
) -> tuple[Float[Tensor, ""], Bool[Tensor, "n"]]:
    """Binary cross entropy of words read from states, summed over the vocabulary; and which are read exactly."""
    error = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none").sum(-1).mean()
    return error, ((logits > 0) == target).all(-1)


class T5Task(Task):
    """Every word learns its clause: from the state of any word all words of its clause can be read.

    A colour so knows whose it is, by name and by place, and a name knows the look that is told with it. Flux's text
    tokens have no positions of their own: what the encoder does not bind together, attention cannot find together.
    """

    def build(self) -> ClauseReader:
        """A T5 encoder."""
        self.tokenizer = make_tokenizer(start=False)
        if not self.init:
            self.shape["vocab_size"] = len(self.tokenizer)
        return ClauseReader(self.load(T5EncoderModel, "keyframes/text_encoder_2"))

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Binary cross entropy over the vocabulary, summed; mean over words."""
        captions = shot_captions(self.seed, step, stage.batch)
        words, target = tokenize(self.tokenizer, captions), clause_targets(self.tokenizer, captions).to(self.device)
        told = target.any(2)
        error, exact = reading_error(model(words.to(self.device)).float()[told], target[told])
        return error, {"exact": exact.float().mean().item()}

    def save(self, folder: Path) -> None:
        """Write the encoder, and the tokenizer beside it."""
        self.model.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class ClipTask(Task):
    """Frames and their captions find each other in a batch (Radford et al. 2021)."""

    def build(self) -> CLIPModel:
        """A CLIP; a new one's vision tower has the shape of the text tower, and sees frames squeezed to a square."""
        self.tokenizer = make_tokenizer(start=True)
        if self.init:
            return CLIPModel.from_pretrained(self.init)
        text = self.shaped("keyframes/text_encoder") | {"vocab_size": len(self.tokenizer)}
        shared = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim"
        vision = {key: text[key] for key in shared} | {"image_size": TOY.keyframes.height, "patch_size": 16}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"]))

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Symmetric cross entropy over the similarities of fresh keyframes and captions that describe everybody."""
        frames = frames_of_step(self.seed, step, stage.batch, TOY.keyframes.height)
        captions = [sample_movie(f"frames/{self.seed}/{step}/{i}", 1).captions()[0] for i in range(stage.batch)]
        square = F.interpolate(frames, (self.model.config.vision_config.image_size,) * 2, mode="area")
        words = tokenize(self.tokenizer, captions).to(self.device)
        logits = model(words, square.to(self.device)).logits_per_text.float()
        target = torch.arange(stage.batch, device=self.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"found": (logits.argmax(1) == target).float().mean().item()}

    def save(self, folder: Path) -> None:
        """Write both towers, and the tokenizer beside them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class Towers(CLIP):
    """open_clip's model, in whatever precision its parameters have."""

    def forward(self, frames: Float[Tensor, "n 3 h w"], words: Tensor) -> dict[str, Tensor]:
        """Unit vectors of frames and descriptions, and the scale of their products."""
        return super().forward(frames.to(self.logit_scale.dtype), words)


class RetrievalTask(Task):
    """Keyframes and the descriptions of their shots find each other in a batch (Radford et al. 2021)."""

    def build(self) -> Towers:
        """Two towers as their configuration says, or the shipped ones'."""
        self.tokenizer, self.criterion = make_tokenizer(start=True), ClipLoss()
        self.tokenizer.model_max_length = WORDS
        config = Path(self.init or TOY.keyframes.towers) / SETTINGS
        self.told = json.loads(config.read_text())["model_cfg"] | self.shape
        text = {key: value for key, value in self.told["text_cfg"].items() if key != "hf_tokenizer_name"}
        vision = CLIPVisionCfg(**self.told["vision_cfg"])
        model = Towers(self.told["embed_dim"], vision, CLIPTextCfg(**text), output_dict=True)
        if self.init:
            model.load_state_dict(load_file(Path(self.init) / TOWERS))
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
        save_file(half, folder / TOWERS)
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
        write_json(folder / SETTINGS, {"model_cfg": self.told, "preprocess_cfg": preprocess})
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


def clip_text_tower(model: CLIPModel | CLIPTextModel) -> CLIPTextModel:
    """The text half of a CLIP, as the Flux pipeline wants it, or what is one already; frozen."""
    if isinstance(model, CLIPTextModel):
        return model.requires_grad_(False)
    config: Any = model.config
    text = CLIPTextModel(config.text_config)
    text.load_state_dict(model.text_model.state_dict())
    return text.requires_grad_(False)
