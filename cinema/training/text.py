"""Text encoders of the toy preset: tokenizers over the shot list's words, a small T5, a small CLIP.

CLIP is trained by contrast between frames and captions. T5 is trained text to text, as the real one was: it rewrites
a caption position by position, and so learns whose colour a colour is. Flux's text tokens have no positions of their
own, so what T5 does not bind together nobody can. It goes on learning with the keyframe model.
"""

from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from cinema.config import TOY
from cinema.files import write_text
from cinema.toyworld.world import (
    ACTIONS,
    CAMERAS,
    COLOURS,
    HATS,
    PLACES,
    POSITIONS,
    SHAPES,
    SIZES,
    parse_caption,
    sample_movie,
)
from cinema.training.autoencoder import frames_of_step, to_image
from cinema.training.config import Stage

PAD, END, START, UNKNOWN = "<|pad|>", "<|end|>", "<|start|>", "<|unknown|>"


def vocabulary() -> list[str]:
    """Every word of the shot list, then single characters, so that any text can be spelled."""
    words = [*SIZES, *PLACES, *POSITIONS, *ACTIONS, *COLOURS, *SHAPES, *HATS, *" ".join(CAMERAS).split(), "shot"]
    letters = ascii_lowercase + digits + "<>-_'"
    pieces = [*TOY.tags, *words, *letters, *(f"##{x}" for x in letters)]
    return list(dict.fromkeys([PAD, END, START, UNKNOWN, *pieces]))


def make_tokenizer(start: bool, length: int = TOY.keyframes.text_tokens) -> PreTrainedTokenizerFast:
    """A word-piece tokenizer that drops punctuation and case; T5 has no start token, CLIP has one."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[.,:;!?]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    single = f"{START} $A {END}" if start else f"$A {END}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, ids[t]) for t in (START, END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=START,
        unk_token=UNKNOWN,
        model_max_length=length,
    )


def small_t5(width: int = 128, layers: int = 2, heads: int = 4) -> T5ForConditionalGeneration:
    """A T5 with few parameters: an encoder, and one decoder layer to train it with."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(vocabulary()),
            d_model=width,
            d_kv=width // heads,
            d_ff=2 * width,
            num_layers=layers,
            num_decoder_layers=1,
            num_heads=heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            decoder_start_token_id=0,  # type: ignore[call-arg]
            eos_token_id=1,
            use_cache=False,
        )
    )


class T5Task:
    """Text to text: a caption in, who stands where out, from left to right."""

    def __init__(self, seed: int, init: str | None, **shape: Any) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.model = T5ForConditionalGeneration.from_pretrained(init) if init else small_t5(**shape)
        self.tokenizer = make_tokenizer(start=False)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Cross entropy of the rewritten captions."""
        captions = shot_captions(self.seed, step, stage.batch)
        words, target = (tokenize(self.tokenizer, lines) for lines in (captions, [by_position(c) for c in captions]))
        target = target.masked_fill(target == 0, -100)
        out = model(input_ids=words, labels=target)
        right = ((out.logits.argmax(-1) == target) | (target == -100)).all(1).float().mean()
        return out.loss, {"exact": right.item()}

    def save(self, folder: Path) -> None:
        """Write the encoder, and the tokenizer beside it."""
        t5_encoder(self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Captions, and what the decoder makes of them, as a text file beside `path`."""
        captions = shot_captions(self.seed, 10**7, 8)
        model: Any = self.model
        ids = model.generate(tokenize(self.tokenizer, captions), max_new_tokens=28, do_sample=False)
        lines = [
            f"{c}\n  -> {self.tokenizer.decode(x, skip_special_tokens=True)}\n"
            for c, x in zip(captions, ids, strict=True)
        ]
        write_text(path.with_suffix(".txt"), "\n".join(lines))


def shot_captions(seed: int, step: int, count: int) -> list[str]:
    """Captions of second and first shots of fresh movies; a function of (seed, step) alone."""
    movies = [sample_movie(f"captions/{seed}/{step}/{i}", 2) for i in range(count)]
    return [movie.captions()[i % 2] for i, movie in enumerate(movies)]


def by_position(text: str) -> str:
    """A caption rewritten from left to right; what it says of each character stays together."""
    setup, looks = parse_caption(text)
    actors = sorted(setup.actors, key=lambda a: POSITIONS[a.position])
    told = [f"{a.position} {looks.get(a.tag, '')} {a.action} {a.tag}" for a in actors]
    return " ".join([*told, setup.place, setup.size, setup.camera])


def t5_encoder(model: T5ForConditionalGeneration) -> T5EncoderModel:
    """The encoder half of a T5, as the Flux pipeline wants it."""
    encoder = T5EncoderModel(T5Config.from_dict(model.config.to_dict() | {"is_encoder_decoder": False}))
    own = encoder.state_dict()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    return encoder


def small_clip(width: int = 128, layers: int = 2, heads: int = 4, image: int = 128, patch: int = 16) -> CLIPModel:
    """A CLIP with few parameters; it sees frames squeezed to a square."""
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    text = tower | {
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": TOY.keyframes.text_tokens,
        "num_attention_heads": heads,
        "projection_dim": width,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    vision = tower | {"image_size": image, "patch_size": patch, "num_attention_heads": heads, "projection_dim": width}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


class ClipTask:
    """Frames and their captions find each other in a batch (Radford et al. 2021)."""

    def __init__(self, seed: int, init: str | None, **shape: Any) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.model = CLIPModel.from_pretrained(init) if init else small_clip(**shape)
        config: Any = self.model.config
        self.tokenizer, self.side = make_tokenizer(start=True), config.vision_config.image_size

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Symmetric cross entropy over the batch's similarities."""
        frames, captions = captioned_frames(self.seed, step, stage.batch)
        out = model(**self._inputs(frames, captions))
        target = torch.arange(stage.batch, device=out.logits_per_text.device)
        logits = out.logits_per_text.float()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"found": (logits.argmax(1) == target).float().mean().item()}

    def save(self, folder: Path) -> None:
        """Write both towers, and the tokenizer beside them."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Frames of a fresh batch in the order in which their captions find them."""
        frames, captions = captioned_frames(self.seed, 10**7, 6)
        found = self.model(**self._inputs(frames, captions)).logits_per_text.argmax(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        to_image(torch.cat([torch.cat(list(frames), 2), torch.cat(list(frames[found]), 2)], 1)).save(path)

    def _inputs(self, frames: Float[Tensor, "n 3 h w"], captions: list[str]) -> dict[str, Tensor]:
        weight = next(self.model.parameters())
        tokens = tokenize(self.tokenizer, captions).to(weight.device)
        side = self.side
        pixels = F.interpolate(frames, (side, side), mode="area").to(weight.device)
        return {"input_ids": tokens, "pixel_values": pixels}


def captioned_frames(seed: int, step: int, count: int) -> tuple[Float[Tensor, "count 3 h w"], list[str]]:
    """Fresh keyframes with captions that describe everybody; a function of (seed, step) alone."""
    captions = [sample_movie(f"frames/{seed}/{step}/{i}", 1).captions()[0] for i in range(count)]
    return frames_of_step(seed, step, count, TOY.keyframes.height), captions


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Int[Tensor, "n t"]:
    """Token ids, padded to the tokenizer's length and cut there, as the Flux pipeline does it."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def clip_text_tower(model: CLIPModel) -> CLIPTextModel:
    """The text half of a CLIP, as the Flux pipeline wants it."""
    config: Any = model.config
    text = CLIPTextModel(CLIPTextConfig.from_dict(config.text_config.to_dict()))
    text.load_state_dict(model.text_model.state_dict())
    return text
