"""Text encoders of the toy preset: tokenizers over the shot list's words, a small T5, a small CLIP.

CLIP is trained by contrast between frames and captions. T5 is trained text to text, as the real one was: it answers
what a caption says of whom, and so learns whose colour a colour is. Flux's text tokens have no positions of their own,
so what T5 does not bind together nobody can.
"""

import random
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
    Actor,
    Look,
    Setup,
    parse_caption,
    sample_movie,
)
from cinema.training.autoencoder import frames_of_step, to_image
from cinema.training.config import Stage

PAD, END, START, UNKNOWN = "<|pad|>", "<|end|>", "<|start|>", "<|unknown|>"
IGNORED = -100  # a label that no loss counts


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
    """Text to text: a caption in, what it says of whom out.

    First it is told from left to right. Then each character is cued by its name or by its place; the cues stand in the
    decoder's input and are not asked for. What is said of a character must so be found from its place as well as from
    its name: which is how a picture asks, in its own shot and in later ones. Cues alone, without the first part, are
    not learned: only captions of one character come out right.

    Args:
        ordered: first so many steps are told from left to right.
    """

    def __init__(self, seed: int, init: str | None, ordered: int = 0, **shape: Any) -> None:
        torch.manual_seed(seed)
        self.seed, self.ordered = seed, ordered
        self.model = T5ForConditionalGeneration.from_pretrained(init) if init else small_t5(**shape)
        self.tokenizer = make_tokenizer(start=False)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Cross entropy of the answers."""
        captions, rng = shot_captions(self.seed, step, stage.batch), random.Random(f"cues/{self.seed}/{step}")
        told = [ordered_facts(c) if step < self.ordered else cued_facts(c, rng) for c in captions]
        answers, target = self._answers(model, captions, told)
        out = F.cross_entropy(answers.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED)
        right = ((answers.argmax(-1) == target) | (target == IGNORED)).all(1).float().mean()
        return out, {"exact": right.item()}

    def save(self, folder: Path) -> None:
        """Write the encoder, and the tokenizer beside it."""
        t5_encoder(self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def sample(self, path: Path, stage: Stage) -> None:
        """Captions and what the decoder answers, the cues in brackets, as a text file beside `path`."""
        captions, rng = shot_captions(self.seed, 10**7, 8), random.Random(0)
        told = [cued_facts(caption, rng) for caption in captions]
        answers, _ = self._answers(self.model, captions, told)
        lines = []
        for caption, facts, ids in zip(captions, told, answers.argmax(-1).tolist(), strict=True):
            said = self.tokenizer.convert_ids_to_tokens(ids[: len(facts)])
            shown = [word if asked else f"[{cue}]" for word, (cue, asked) in zip(said, facts, strict=True)]
            lines.append(f"{caption}\n  -> {' '.join(shown)}\n")
        write_text(path.with_suffix(".txt"), "\n".join(lines))

    def _answers(
        self, model: nn.Module, captions: list[str], told: list[list[tuple[str, bool]]]
    ) -> tuple[Float[Tensor, "n t v"], Int[Tensor, "n t"]]:
        """Logits of every next word, and the words that are asked for."""
        ids = [torch.tensor(self.tokenizer.convert_tokens_to_ids([word for word, _ in facts])) for facts in told]
        asked = [torch.tensor([asked for _, asked in facts]) for facts in told]
        target = [x.masked_fill(~a, IGNORED) for x, a in zip(ids, asked, strict=True)]
        before = nn.utils.rnn.pad_sequence([F.pad(x[:-1], (1, 0)) for x in ids], batch_first=True)
        words = tokenize(self.tokenizer, captions)
        logits = model(input_ids=words, decoder_input_ids=before).logits
        return logits, nn.utils.rnn.pad_sequence(target, batch_first=True, padding_value=IGNORED)


def shot_captions(seed: int, step: int, count: int) -> list[str]:
    """Captions of second and first shots of fresh movies; a function of (seed, step) alone."""
    movies = [sample_movie(f"captions/{seed}/{step}/{i}", 2) for i in range(count)]
    return [movie.captions()[i % 2] for i, movie in enumerate(movies)]


def ordered_facts(text: str) -> list[tuple[str, bool]]:
    """What a caption says, word by word, characters from left to right; every word is asked for."""
    setup, looks = parse_caption(text)
    words: list[str] = []
    for actor in sorted(setup.actors, key=lambda a: POSITIONS[a.position]):
        words += [actor.position, *_look_words(looks, actor), actor.action, actor.tag]
    return [(word, True) for word in (*words, *_rest(setup))]


def cued_facts(text: str, rng: random.Random) -> list[tuple[str, bool]]:
    """What a caption says, word by word, and whether the word is asked for or a cue.

    Characters come in random order, each led by its name or its place as a cue.
    """
    setup, looks = parse_caption(text)
    facts: list[tuple[str, bool]] = []
    for actor in rng.sample(setup.actors, len(setup.actors)):
        cue, other = rng.sample((actor.tag, actor.position), 2)
        facts += [(cue, False), *((word, True) for word in (other, *_look_words(looks, actor), actor.action))]
    return facts + [(word, True) for word in _rest(setup)]


def _look_words(looks: dict[str, Look], actor: Actor) -> list[str]:
    return str(looks.get(actor.tag, "")).replace(",", "").split()


def _rest(setup: Setup) -> list[str]:
    return [setup.place, setup.size, *setup.camera.split(), END]


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
