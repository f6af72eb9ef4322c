"""What a story costs, before anything is allocated: tokens, floating-point operations and bytes at their peak.

A Flux transformer is a table of linear layers (:func:`linears`). A layer costs 2 FLOPs per weight and row, whatever the
row is: an image token, a text token or a whole pair. Attention costs 4 d FLOPs per query and key that it sees. `d` is
the width, `n` the tokens of all pairs; a story is the `sides` of its pairs' GoldenMem levels, in the order of time.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import try_to_load_from_cache

from cinema.config import KeyframeSettings
from cinema.errors import UserError
from cinema.goldenmem import PATCH, Layout, tokens
from cinema.keyframes import check_weights

Rows = Literal["image", "text", "token", "pair"]

FLUX_1_DEV: dict[str, Any] = {  # FLUX.1-dev, transformer/config.json as published
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
HALF, SINGLE = 2, 4  # bytes of a number in bfloat16 and in float32
STATES = 4  # float32 copies of what is trained: master, average, Adam's two moments
# Numbers per token, in widths of d, that a (single-stream, double-stream) block keeps for its backward pass. The
# first: its input, normed and modulated (3); q and k before their norm (2); q, k, v and what attention gives (4); the
# MLP before its activation (4); what the last layer reads (5) and gives (1). With adapters on frozen layers, the input
# (2), q and k (2), attention (4) and the MLP (4). A CPU norms q and k in float32, in steps: 8 instead of 2, or 4.
KEPT = {
    ("full", "cuda"): (19, 23), ("full", "cpu"): (25, 29), ("lora", "cuda"): (12, 14), ("lora", "cpu"): (14, 16),
}  # fmt: skip
FORWARD, BACKWARD = 16, 8  # the same, for what lives inside a single-stream block only while it runs


@dataclass(frozen=True)
class Work:
    """What is done with a story: a forward pass, or a step of training."""

    train: Literal["no", "full", "lora"] = "no"  #: all parameters, or adapters
    recompute: bool = False  #: gradient checkpointing: a block keeps its input, and runs again in the backward pass
    causal: bool = False  #: pairs see themselves and earlier ones; else all see all
    rank: int = 16  #: of the adapters
    device: Literal["cuda", "cpu"] = "cuda"  #: whose memory it is
    shards: int = 1  #: processes that share weights, gradients and moments; the block at work, whole in each, is extra


@dataclass(frozen=True)
class Budget:
    """What a story of so many pairs costs if all of them are whole, and with GoldenMem."""

    pairs: int
    naive_tokens: int
    goldenmem_tokens: int
    naive_flops: int
    goldenmem_flops: int
    peak_bytes: int  #: with GoldenMem


class Linear(NamedTuple):
    """So many linear layers of one shape."""

    layers: int
    inputs: int
    outputs: int
    rows: Rows  #: what they are applied to; a "token" is one of the image or of the text
    in_block: bool = True  #: of a transformer block: runs again with recompute
    adapted: bool = False  #: by LoRA: queries, keys, values and outputs of attention, as is usual

    @property
    def weights(self) -> int:
        """Numbers in their matrices."""
        return self.layers * self.inputs * self.outputs

    def adapter(self, rank: int) -> int:
        """Numbers in their adapters."""
        return self.adapted * self.layers * rank * (self.inputs + self.outputs)


def linears(config: Mapping[str, Any]) -> list[Linear]:
    """All linear layers of a Flux transformer, by diffusers' `config` of it."""
    d, channels = _width(config), config["in_channels"]
    double, single = config["num_layers"], config["num_single_layers"]
    scalars = 1 + bool(config["guidance_embeds"])  # the noise level, and a distilled model's guidance
    outside = [
        Linear(1, channels, d, "image", in_block=False),
        Linear(1, config["joint_attention_dim"], d, "text", in_block=False),
        Linear(scalars, 256, d, "pair", in_block=False),  # from sinusoids
        Linear(1, config["pooled_projection_dim"], d, "pair", in_block=False),
        Linear(scalars + 1, d, d, "pair", in_block=False),
        Linear(1, d, 2 * d, "pair", in_block=False),  # the last modulation
        Linear(1, d, channels, "image", in_block=False),
    ]
    streams: tuple[Rows, Rows] = ("image", "text")
    return [
        *outside,
        *(Linear(4 * double, d, d, rows, adapted=True) for rows in streams),
        *(Linear(double, d, 4 * d, rows) for rows in streams),
        *(Linear(double, 4 * d, d, rows) for rows in streams),
        Linear(2 * double, d, 6 * d, "pair"),
        Linear(3 * single, d, d, "token", adapted=True),
        Linear(single, d, 4 * d, "token"),
        Linear(single, 5 * d, d, "token"),
        Linear(single, d, 3 * d, "pair"),
    ]


def parameters(config: Mapping[str, Any]) -> int:
    """Weights and biases of all layers, and the norms of queries and keys."""
    norms = config["attention_head_dim"] * (4 * config["num_layers"] + 2 * config["num_single_layers"])
    return norms + sum(x.weights + x.layers * x.outputs for x in linears(config))


def flops(config: Mapping[str, Any], sides: Sequence[int], text: int, work: Work) -> int:
    """FLOPs of a story with `text` tokens per pair.

    Backward, a layer costs its forward pass twice: for its input, and for its weights unless they are frozen. Attention
    costs two and a half: fused kernels, which keep no scores, compute them again.
    """
    lengths, layers = [tokens(side) + text for side in sides], linears(config)
    rows = {"image": sum(map(tokens, sides)), "text": text * len(sides), "token": sum(lengths), "pair": len(sides)}
    linear, blocks = (sum(2 * x.weights * rows[x.rows] for x in layers if x.in_block >= b) for b in (False, True))
    seen = accumulate(lengths) if work.causal else [sum(lengths)] * len(lengths)
    local, wide = sum(n * n for n in lengths), sum(n * m for n, m in zip(lengths, seen, strict=True))
    attention = 4 * _width(config) * (config["num_layers"] * local + config["num_single_layers"] * wide)
    if work.train == "no":
        return linear + attention
    total = (3 if work.train == "full" else 2) * linear + 7 * attention // 2
    if work.train == "lora":
        total += sum(6 * x.adapter(work.rank) * rows[x.rows] for x in layers)
    return total + work.recompute * (blocks + attention)


def peak_bytes(config: Mapping[str, Any], sides: Sequence[int], text: int, work: Work) -> int:
    """Most memory of a process at a time, with one story in a batch; weights are bfloat16. It is :eq:`eq-peak`.

    Trained as :mod:`cinema.training` does it: float32 masters, their average and Adam's moments, cast to bfloat16 for
    the call. The peak is where the backward pass begins and all is kept, or where it ends and all gradients are there.
    """
    weights, width = parameters(config) // work.shards, _width(config) * _tokens(sides, text) * HALF
    if work.train == "no":
        return weights * HALF + FORWARD * width
    single, double = KEPT[work.train, work.device]
    blocks = config["num_single_layers"], config["num_layers"]
    kept = (sum(blocks) + single if work.recompute else blocks[0] * single + blocks[1] * double) * width
    adapters = sum(x.adapter(work.rank) for x in linears(config)) // work.shards
    frozen, trained = (0, weights) if work.train == "full" else (weights, adapters)
    most = max(trained * HALF + kept + BACKWARD * width, trained * SINGLE)
    return frozen * HALF + trained * STATES * SINGLE + most


def table(settings: KeyframeSettings, pairs: Sequence[int], work: Work = Work()) -> list[Budget]:
    """A row for every number of `pairs`, with the levels, grouping, ratio and weights of these settings.

    Pairs beyond the last level have left the memory. UserError for what fits no layout, or weights that are not here.
    """
    config, side, text = transformer_config(settings.weights), settings.height // PATCH, settings.text_tokens
    levels, rows = (settings.memory_levels, settings.memory_group, settings.memory_ratio), list[Budget]()
    for count in pairs:
        try:
            gold = Layout(min(count, settings.memory_levels * settings.memory_group), side, *levels).sides
        except ValueError as error:
            raise UserError(f"{error}; change pairs, levels, group or ratio") from None
        naive = (side,) * count
        (n, before), (m, after) = ((_tokens(s, text), flops(config, s, text, work)) for s in (naive, gold))
        rows.append(Budget(count, n, m, before, after, peak_bytes(config, gold, text, work)))
    return rows


def transformer_config(weights: str) -> dict[str, Any]:
    """Configuration of a pipeline's transformer: a folder's, the hub cache's, or of FLUX.1 as published; UserError."""
    check_weights(weights, "keyframe")
    file = Path(weights) / "transformer" / "config.json"
    cached = file if file.is_file() else try_to_load_from_cache(weights, "transformer/config.json")
    if isinstance(cached, str | Path):
        return json.loads(Path(cached).read_text(encoding="utf-8"))
    if weights == "black-forest-labs/FLUX.1-dev":
        return FLUX_1_DEV
    raise UserError(f"{weights}: its transformer/config.json is not on this machine; download it first")


def _tokens(sides: Sequence[int], text: int) -> int:
    return sum(tokens(side) + text for side in sides)


def _width(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]
