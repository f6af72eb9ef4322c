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
from cinema.files import write_text
from cinema.toyworld.world import ACTIONS, CAMERAS, COLOURS, HATS, PLACES, POSITIONS, SHAPES, SIZES, sample_movie
from cinema.training.autoencoder import frames_of_step, to_image
from cinema.training.config import Stage

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


class T5Task:
    """Every word learns its clause: from the state of any word all words of its clause can be read.

    A colour so knows whose it is, by name and by place, and a name knows the look that is told with it. Flux's text
    tokens have no positions of their own: what the encoder does not bind together, attention cannot find together.
    """

    def __init__(self, seed: int, init: str | None, **shape: Any) -> None:
        torch.manual_seed(seed)
        self.seed, self.tokenizer = seed, make_tokenizer(start=False)
        self.model = ClauseReader(T5EncoderModel.from_pretrained(init) if init else small_t5(**shape))

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Binary cross entropy over the vocabulary, summed; mean over words."""
        captions = shot_captions(self.seed, step, stage.batch)
        words, target = tokenize(self.tokenizer, captions), clause_targets(self.tokenizer, captions)
        words, target = (x.to(next(model.parameters()).device) for x in (words, target))
        counts = target.any(2)
        logits, target = model(words).float()[counts], target[counts]
        error = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none").sum(1).mean()
        return error, {"exact": ((logits > 0) == target).all(1).float().mean().item()}

    def save(self, folder: Path) -> None:
        """Write the encoder, and the tokenizer beside it."""
        self.model.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Captions, and for every word the words that are read from its state, as a text file beside `path`."""
        captions = shot_captions(self.seed, 10**7, 8)
        found = self.model(tokenize(self.tokenizer, captions).to(self.model.encoder.device)) > 0
        lines = []
        for caption, row in zip(captions, found, strict=True):
            told = self.tokenizer.tokenize(caption)
            read = (" ".join(self.tokenizer.convert_ids_to_tokens(x.nonzero()[:, 0].tolist())) for x in row)
            lines += [caption, *(f"  {word}: {those}" for word, those in zip(told, read, strict=False)), ""]
        write_text(path.with_suffix(".txt"), "\n".join(lines))


class ClipTask:
    """Frames and their captions find each other in a batch (Radford et al. 2021)."""

    def __init__(self, seed: int, init: str | None, **shape: Any) -> None:
        torch.manual_seed(seed)
        self.seed, self.tokenizer = seed, make_tokenizer(start=True)
        self.model: Any = CLIPModel.from_pretrained(init) if init else small_clip(**shape)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Symmetric cross entropy over the batch's similarities."""
        logits = model(**self._batch(step, stage.batch)[1]).logits_per_text.float()
        target = torch.arange(stage.batch, device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"found": (logits.argmax(1) == target).float().mean().item()}

    def save(self, folder: Path) -> None:
        """Write both towers, and the tokenizer beside them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Frames of a fresh batch, and below in the order in which their captions find them."""
        frames, inputs = self._batch(10**7, 6)
        found = self.model(**inputs).logits_per_text.argmax(1)
        to_image(torch.cat([torch.cat(list(frames), 2), torch.cat(list(frames[found]), 2)], 1)).save(path)

    def _batch(self, step: int, count: int) -> tuple[Float[Tensor, "n 3 h w"], dict[str, Tensor]]:
        """Fresh keyframes, and as CLIP sees them: squeezed to a square, with captions that describe everybody."""
        frames = frames_of_step(self.seed, step, count, TOY.keyframes.height)
        captions = [sample_movie(f"frames/{self.seed}/{step}/{i}", 1).captions()[0] for i in range(count)]
        pixels = F.interpolate(frames, (self.model.config.vision_config.image_size,) * 2, mode="area")
        inputs = {"input_ids": tokenize(self.tokenizer, captions), "pixel_values": pixels}
        return frames, {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


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


def clip_text_tower(model: CLIPModel) -> CLIPTextModel:
    """The text half of a CLIP, as the Flux pipeline wants it."""
    config: Any = model.config
    text = CLIPTextModel(config.text_config)
    text.load_state_dict(model.text_model.state_dict())
    return text
