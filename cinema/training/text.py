"""Text encoders of the toy preset: tokenizers over the shot list's words, a small T5, a small CLIP.

CLIP is trained by contrast between frames and captions. T5's encoder is trained to bind: every word learns its clause,
and so whose colour a colour is.
"""

from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from cinema.config import TOY
from cinema.toyworld.world import ACTIONS, CAMERAS, COLOURS, HATS, PLACES, POSITIONS, SHAPES, SIZES, sample_movie
from cinema.training.autoencoder import frames_of_step
from cinema.training.config import Stage
from cinema.training.loop import Task

PAD, END, START, UNKNOWN = "<|pad|>", "<|end|>", "<|start|>", "<|unknown|>"


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
        return ClauseReader(T5EncoderModel.from_pretrained(self.init) if self.init else small_t5(**self.shape))

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
        """A CLIP."""
        self.tokenizer = make_tokenizer(start=True)
        return CLIPModel.from_pretrained(self.init) if self.init else small_clip(**self.shape)

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


def small_t5(width: int = 128, layers: int = 2, heads: int = 4) -> T5EncoderModel:
    """A T5 encoder with few parameters."""
    # fmt: off
    return T5EncoderModel(T5Config(
        d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=layers, num_heads=heads, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", vocab_size=len(vocabulary()), pad_token_id=0, eos_token_id=1,
        is_encoder_decoder=False, use_cache=False,
    ))
    # fmt: on


def small_clip(width: int = 128, layers: int = 2, heads: int = 4, image: int = 128, patch: int = 16) -> CLIPModel:
    """A CLIP with few parameters; it sees frames squeezed to a square."""
    # fmt: off
    tower = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "projection_dim": width,
    }
    text = tower | {
        "vocab_size": len(vocabulary()), "max_position_embeddings": TOY.keyframes.text_tokens,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }
    # fmt: on
    vision = tower | {"image_size": image, "patch_size": patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def clip_text_tower(model: CLIPModel | CLIPTextModel) -> CLIPTextModel:
    """The text half of a CLIP, as the Flux pipeline wants it, or what is one already; frozen."""
    if isinstance(model, CLIPTextModel):
        return model.requires_grad_(False)
    config: Any = model.config
    text = CLIPTextModel(config.text_config)
    text.load_state_dict(model.text_model.state_dict())
    return text.requires_grad_(False)
