"""MM-DiT with pairs: a `FluxTransformer2DModel` that sees several captioned keyframes at once.

A pair is one keyframe and its caption. Double-stream blocks are local: every pair alone, which is a fold
into the batch. Single-stream blocks are global: all pairs in one ragged sequence, without any padding.
Parameters and `state_dict` are stock Flux's; with one pair the output is stock Flux's, too.

Axes: `b` story, `p` pair, `s` image tokens, `t` text tokens, `l` = t + s, `n` tokens of all pairs,
`d` width, `k` head, `h` width of a head, `c` latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
)
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cinema.masking import attend_causal, attend_full

KeyValue = tuple[Float[Tensor, "_b k _n h"], Float[Tensor, "_b k _n h"]]
Rope = Complex[Tensor, "n half"]  # cos + i sin of every token's angles


@dataclass
class PairGroup:
    """Pairs of equal token counts, one fold: usually one GoldenMem level.

    Float tensors have the dtype of the model, or any under autocast; `sigma` is best kept in float32.

    Attributes:
        latents: packed image tokens, at the noise level `sigma`.
        text: T5 states of the captions.
        pooled: CLIP's pooled states of the captions.
        sigma: noise level of every pair, 0 data to 1 noise (stock Flux's timestep / 1000).
        ids: (y, x) of the image tokens; a coarse level spreads over the extent of the finest.
        index: place of each pair in time, shared by the batch; distinct over all groups. It is axis 0 of the
            rope in the single-stream blocks, and it orders the causal mask.
    """

    latents: Float[Tensor, "b p s c"]
    text: Float[Tensor, "b p t e"]
    pooled: Float[Tensor, "b p f"]
    sigma: Float[Tensor, "b p"]
    ids: Float[Tensor, "s 2"]
    index: Int[Tensor, "p"]


@dataclass
class ContextCache:
    """Keys and values of context pairs, per single-stream block, and the last pair's index.

    `blocks` hold tensors of shape "b k n h"; a cache of one story serves any batch.
    """

    blocks: list[KeyValue]
    last: int

    @property
    def tokens(self) -> int:
        """Number of context tokens."""
        return self.blocks[0][0].shape[2]


class Ragged:
    """Order of the pairs of several groups in one sequence: by index, text before image within a pair.

    Attributes:
        order: (group, position in the group) of each pair.
        lengths: tokens of each pair.
        runs: (pairs, tokens per pair) of each stretch of equal lengths, so that most work is a broadcast.

    Raises:
        ValueError: if two pairs share an index or there is no pair.
    """

    def __init__(self, groups: list[PairGroup]) -> None:
        places = sorted((k, g, j) for g, group in enumerate(groups) for j, k in enumerate(group.index.tolist()))
        self.index = [k for k, _, _ in places]
        if not places or len(set(self.index)) < len(self.index):
            raise ValueError(f"pairs need distinct indices, and at least one pair; got {self.index}")
        self.order = [(g, j) for _, g, j in places]
        sizes = [group.text.shape[2] + group.latents.shape[2] for group in groups]
        self.lengths = [sizes[g] for g, _ in self.order]
        self.runs = [(len(list(run)), length) for length, run in groupby(self.lengths)]

    def gather(self, groups: list[Float[Tensor, "b _p _l d"]]) -> Float[Tensor, "b n d"]:
        """Tokens of every group → one sequence."""
        if len(groups) == 1 and self.order == sorted(self.order):
            return rearrange(groups[0], "b p l d -> b (p l) d")
        return torch.cat([groups[g][:, j] for g, j in self.order], dim=1)

    def scatter(self, x: Float[Tensor, "b n d"], groups: int) -> list[Float[Tensor, "b _p _l d"]]:
        """One sequence → tokens of every group; undoes `gather`."""
        if groups == 1 and self.order == sorted(self.order):
            return [rearrange(x, "b (p l) d -> b p l d", p=len(self.order))]
        pieces = dict(zip(self.order, x.split(self.lengths, dim=1), strict=True))
        counts = [sum(g == group for g, _ in self.order) for group in range(groups)]
        return [torch.stack([pieces[g, j] for j in range(count)], dim=1) for g, count in enumerate(counts)]

    def per_pair(
        self,
        fn: Callable[..., Tensor],
        tokens: list[Float[Tensor, "b n d"]],
        rows: list[Float[Tensor, "b p d"]],
    ) -> Float[Tensor, "b n d"]:
        """Apply an elementwise `fn` to tokens and their pair's rows, broadcasting instead of gathering."""
        done, token, pair = [], 0, 0
        for pairs, length in self.runs:
            end, last = token + pairs * length, pair + pairs
            blocks = [rearrange(x[:, token:end], "b (p l) d -> b p l d", p=pairs) for x in tokens]
            done.append(fn(*blocks, *(rearrange(r[:, pair:last], "b p d -> b p 1 d") for r in rows)))
            token, pair = end, last
        done = [rearrange(x, "b p l d -> b (p l) d") for x in done]
        return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def rotate(x: Float[Tensor, "b n k h"], rope: Rope) -> Float[Tensor, "b n k h"]:
    """Rotate neighbouring channels of queries or keys by their token's angles (Su et al. 2021), in float32.

    Complex products: eager, and with the backward pass, three times faster on a CPU than sines and cosines.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rearrange(rope, "n half -> n 1 half")).flatten(-2).to(x.dtype)


def normalised(norm: torch.nn.RMSNorm, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`norm(x)` in x's own dtype: under autocast the module itself would return float32, by a slow path."""
    weight = norm.weight.to(x.dtype) if norm.weight is not None else None
    return F.rms_norm(x, norm.normalized_shape, weight, norm.eps)


class LocalProcessor(FluxAttnProcessor):
    """Joint attention of a double-stream block: stock, or by `attend_full` if given the pairs' `local_rope`."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        local_rope: Rope | None = None,
    ) -> Any:
        """Attention output for image and text, both of shape "b n d"."""
        if local_rope is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        image = _heads(attn.head_dim, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        text = _heads(attn.head_dim, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q = torch.cat([normalised(attn.norm_added_q, text[0]), normalised(attn.norm_q, image[0])], dim=1)
        k = torch.cat([normalised(attn.norm_added_k, text[1]), normalised(attn.norm_k, image[1])], dim=1)
        q, k, v = rotate(q, local_rope), rotate(k, local_rope), torch.cat([text[2], image[2]], dim=1)
        out = attend_full(*(rearrange(z, "b n k h -> b k n h") for z in (q, k, v)))
        words, pixels = rearrange(out, "b k n h -> b n (k h)").tensor_split([text[0].shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](pixels)), attn.to_add_out(words)


class InterleavedSingleBlock(FluxSingleTransformerBlock):
    """Flux's single-stream block; given `pairs`, it modulates each pair by its own row and attends over all."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        pairs: Ragged | None = None,
        causal: bool = False,
        past: KeyValue | None = None,
    ) -> Any:
        """Stock without `pairs`; with them as in `interleave`. One entry, so that FSDP and compile see one block."""
        if pairs is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        return self.interleave(hidden_states, temb, image_rotary_emb, pairs, causal, past)

    def interleave(
        self,
        x: Float[Tensor, "b n d"],
        temb: Float[Tensor, "b p d"],
        rope: Rope,
        pairs: Ragged,
        causal: bool,
        past: KeyValue | None,
    ) -> tuple[Float[Tensor, "b n d"], KeyValue]:
        """Global attention over all pairs and, if given, `past`; also returns this sequence's keys and values."""
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=-1)  # b p d: rows, not tokens
        normed = pairs.per_pair(_modulate, [self.norm.norm(x)], [shift, 1 + scale])  # b n d
        q, key, value = self._qkv(normed, rope)  # b k n h
        keys, values = (key, value) if past is None else _append(past, key, value)
        out = attend_causal(q, keys, values, pairs.lengths) if causal else attend_full(q, keys, values)
        out = rearrange(out, "b k n h -> b n (k h)")
        out = self.proj_out(torch.cat([out, self.act_mlp(self.proj_mlp(normed))], dim=-1))  # b n d
        return pairs.per_pair(_gated_add, [x, out], [gate]), (key, value)

    def _qkv(self, x: Float[Tensor, "b n d"], rope: Rope) -> list[Float[Tensor, "b k n h"]]:
        a = self.attn
        q, k, v = _heads(a.head_dim, x, a.to_q, a.to_k, a.to_v)
        q, k = rotate(normalised(a.norm_q, q), rope), rotate(normalised(a.norm_k, k), rope)
        return [rearrange(z, "b n k h -> b k n h") for z in (q, k, v)]


class InterleavedFluxTransformer(FluxTransformer2DModel):
    """Flux over several image-text pairs with hybrid attention masking (paper, section 3.1).

    `forward` is inherited: one picture, stock. `forward_pairs` takes groups of pairs. Loads from and saves to
    the same folders as the stock class; LoRA adapters and gradient checkpointing work as there.
    """

    _no_split_modules = ["FluxTransformerBlock", "InterleavedSingleBlock"]  # noqa: RUF012
    _repeated_blocks = ["FluxTransformerBlock", "InterleavedSingleBlock"]  # noqa: RUF012

    @wraps(FluxTransformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.single_transformer_blocks:
            block.__class__ = InterleavedSingleBlock  # same parameters; only `forward` learns about pairs
        for block in self.transformer_blocks:
            block.get_submodule("attn").set_processor(LocalProcessor())  # type: ignore[operator]

    def forward_pairs(
        self,
        groups: list[PairGroup],
        causal: bool = False,
        cache: ContextCache | None = None,
        guidance: float | None = None,
    ) -> list[Float[Tensor, "b _p _s c"]]:
        """Velocity of every pair, each at its own noise level.

        Args:
            groups: at least one; equal batch sizes, ragged token counts.
            causal: pair i sees pairs <= i only (by index), else every pair sees every pair.
            cache: context that all these pairs see as well; its pairs come before theirs.
            guidance: scale told to a guidance-distilled base; needed by those, ignored by others.

        Returns:
            Velocities in the order of `groups`, shaped like their latents.

        Raises:
            ValueError: indices repeat or do not follow the cache's, or `guidance` is missing.
        """
        pairs = Ragged(groups)
        if cache is not None and pairs.index[0] <= cache.last:
            raise ValueError(f"pair {pairs.index[0]} does not come after the cached pair {cache.last}")
        x, tembs = self._blocks(groups, pairs, causal, cache, guidance)
        return [self._head(x, g, t) for x, g, t in zip(pairs.scatter(x, len(groups)), groups, tembs, strict=True)]

    def encode_context(
        self, groups: list[PairGroup], causal: bool = True, guidance: float | None = None
    ) -> ContextCache:
        """Run context pairs once and keep their keys and values for `forward_pairs(..., cache=)`.

        With `causal`, pairs run later against the cache equal the joint causal forward; without, the context
        sees itself in both directions but not the pairs to come. Arguments and errors as in `forward_pairs`.
        """
        pairs = Ragged(groups)
        kept: list[KeyValue] = []
        self._blocks(groups, pairs, causal, None, guidance, kept)
        return ContextCache(kept, pairs.index[-1])

    def stock(self) -> FluxTransformer2DModel:
        """A stock `FluxTransformer2DModel` around the very same parameters, for pipelines and for saving."""
        with torch.device("meta"):
            model = FluxTransformer2DModel.from_config(self.config)
        model.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return model.train(self.training)

    def _blocks(
        self,
        groups: list[PairGroup],
        pairs: Ragged,
        causal: bool,
        cache: ContextCache | None,
        guidance: float | None,
        kept: list[KeyValue] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], list[Float[Tensor, "b _p d"]]]:
        tembs = [self._condition(group, guidance) for group in groups]  # b p d
        x = pairs.gather([self._local(group, temb) for group, temb in zip(groups, tembs, strict=True)])  # b n d
        temb = torch.stack([tembs[g][:, j] for g, j in pairs.order], dim=1)  # b p d
        rope = self._rope([_positions(groups[g], k) for k, (g, _) in zip(pairs.index, pairs.order, strict=True)])
        for i, block in enumerate(self.single_transformer_blocks):
            past = cache.blocks[i] if cache is not None else None
            x, key_value = self._run(block, x, None, temb, rope, None, pairs, causal, past)
            if kept is not None:
                kept.append(key_value)
        return x, tembs

    def _condition(self, group: PairGroup, guidance: float | None) -> Float[Tensor, "b p d"]:
        pooled = rearrange(group.pooled, "b p f -> (b p) f")
        time = rearrange(group.sigma, "b p -> (b p)").float() * 1000
        if not self.config["guidance_embeds"]:
            return self.time_text_embed(time, pooled).unflatten(0, group.sigma.shape)
        if guidance is None:
            raise ValueError("this model is guidance-distilled; give `guidance`, for FLUX.1-dev 3.5")
        scale = torch.full_like(time, guidance * 1000)
        return self.time_text_embed(time, scale, pooled).unflatten(0, group.sigma.shape)

    def _local(self, group: PairGroup, temb: Float[Tensor, "b p d"]) -> Float[Tensor, "b p l d"]:
        image = self.x_embedder(rearrange(group.latents, "b p s c -> (b p) s c"))  # (b p) s d
        text = self.context_embedder(rearrange(group.text, "b p t e -> (b p) t e"))  # (b p) t d
        rows = rearrange(temb, "b p d -> (b p) d")
        rope = self._rope([_positions(group, 0)])  # a pair alone: its index cancels
        for block in self.transformer_blocks:
            text, image = self._run(block, image, text, rows, None, {"local_rope": rope})
        return torch.cat([text, image], dim=1).unflatten(0, group.sigma.shape)

    def _rope(self, positions: list[Float[Tensor, "_l 3"]]) -> Rope:
        cos, sin = self.pos_embed(torch.cat(positions))  # n h, each angle twice
        return torch.complex(cos[:, ::2].float(), sin[:, ::2].float())

    def _head(self, x: Float[Tensor, "b p l d"], group: PairGroup, temb: Float[Tensor, "b p d"]) -> Tensor:
        image = rearrange(x[:, :, group.text.shape[2] :], "b p s d -> (b p) s d")
        out = self.proj_out(self.norm_out(image, rearrange(temb, "b p d -> (b p) d")))
        return out.unflatten(0, group.sigma.shape)

    def _run(self, block: torch.nn.Module, *args: Any) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)  # type: ignore[misc]
        return block(*args)


def _positions(group: PairGroup, index: int) -> Float[Tensor, "l 3"]:
    image = F.pad(group.ids, (1, 0), value=float(index))
    text = group.ids.new_tensor([index, 0.0, 0.0]).expand(group.text.shape[2], 3)
    return torch.cat([text, image])


def _heads(width: int, x: Tensor, *projections: torch.nn.Module) -> list[Float[Tensor, "b n k h"]]:
    return [rearrange(to(x), "b n (k h) -> b n k h", h=width) for to in projections]


def _append(past: KeyValue, key: Tensor, value: Tensor) -> list[Tensor]:
    b = key.shape[0]
    return [torch.cat([old.expand(b, -1, -1, -1), new], dim=2) for old, new in zip(past, (key, value), strict=True)]


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, scale)


def _gated_add(x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, out)
