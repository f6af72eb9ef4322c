"""MM-DiT with pairs: a `FluxTransformer2DModel` that sees several captioned keyframes at once.

A pair is a keyframe and its caption. Double-stream blocks are local: every pair alone, a fold into the batch.
Single-stream blocks are global: all pairs in one ragged sequence, without padding. Parameters are stock Flux's; with
one pair the output is, too. Axes: `b` story, `p` pair, `s` image tokens, `t` text tokens, `l` = t + s, `n` tokens of
all pairs, `d` width, `k` head, `h` width of a head, `c` latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_flux as flux
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cinema.masking import attend_causal, attend_full

KeyValue = tuple[Float[Tensor, "_b k _n h"], Float[Tensor, "_b k _n h"]]
Rope = Complex[Tensor, "n half"]  # cos + i sin of every token's angles


@dataclass
class PairGroup:
    """Pairs of equal token counts, one fold: usually one GoldenMem level.

    Float tensors have the dtype of the model; `sigma` is best kept in float32.
    """

    latents: Float[Tensor, "b p s c"]  #: packed image tokens, at the noise level `sigma`
    text: Float[Tensor, "b p t e"]  #: T5 states of the captions
    pooled: Float[Tensor, "b p f"]  #: CLIP's pooled states of the captions
    sigma: Float[Tensor, "b p"]  #: noise level, 0 data to 1 noise (stock Flux's timestep / 1000)
    ids: Float[Tensor, "s 2"]  #: (y, x) of the image tokens; a coarse level spreads over the extent of the finest
    index: Int[Tensor, "p"]  #: place in time, distinct over all groups: axis 0 of the global rope, order of the mask


@dataclass
class ContextCache:
    """Keys and values of context pairs, per single-stream block; a cache of one story serves any batch."""

    blocks: list[KeyValue]  #: each tensor is "b k n h"
    last: int  #: index of the last pair
    model: int  #: `id` of the transformer that made it

    @property
    def tokens(self) -> int:
        """Number of context tokens."""
        return self.blocks[0][0].shape[2]


class Ragged:
    """Order of the pairs of several groups in one sequence: by index, text before image within a pair.

    `order` is (group, position in the group) and `lengths` the tokens of each pair. ValueError if two pairs share an
    index or there is none.
    """

    def __init__(self, groups: list[PairGroup]) -> None:
        places = sorted((k, g, j) for g, group in enumerate(groups) for j, k in enumerate(group.index.tolist()))
        self.index = [k for k, _, _ in places]
        if not places or len(set(self.index)) < len(self.index):
            raise ValueError(f"pairs need distinct indices, and at least one pair; got {self.index}")
        self.order = [(g, j) for _, g, j in places]
        self.lengths = [groups[g].text.shape[2] + groups[g].latents.shape[2] for g, _ in self.order]

    def gather(self, groups: list[Float[Tensor, "b _p _l d"]]) -> Float[Tensor, "b n d"]:
        """Tokens of every group → one sequence."""
        return torch.cat([groups[g][:, j] for g, j in self.order], dim=1)

    def scatter(self, x: Float[Tensor, "b n d"]) -> list[Float[Tensor, "b _p _l d"]]:
        """One sequence → tokens of every group; undoes `gather`."""
        pieces = sorted(zip(self.order, x.split(self.lengths, dim=1), strict=True), key=lambda piece: piece[0])
        return [torch.stack([x for _, x in own], dim=1) for _, own in groupby(pieces, key=lambda piece: piece[0][0])]

    def per_pair(
        self, fn: Callable[..., Tensor], tokens: list[Float[Tensor, "b n d"]], rows: list[Float[Tensor, "b p d"]]
    ) -> Float[Tensor, "b n d"]:
        """Apply an elementwise `fn` to tokens and their pair's rows, a broadcast per stretch of equal lengths."""
        done, token, pair = [], 0, 0
        for length, run in groupby(self.lengths):
            pairs = len(list(run))
            end, last = token + pairs * length, pair + pairs
            blocks = [rearrange(x[:, token:end], "b (p l) d -> b p l d", p=pairs) for x in tokens]
            out = fn(*blocks, *(rearrange(r[:, pair:last], "b p d -> b p 1 d") for r in rows))
            done.append(rearrange(out, "b p l d -> b (p l) d"))
            token, pair = end, last
        return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def rotate(x: Float[Tensor, "b n k h"], rope: Rope) -> Float[Tensor, "b n k h"]:
    """Rotate neighbouring channels of queries or keys by their token's angles, :eq:`eq-rope`, in float32.

    Complex products: eager, and with the backward pass, three times faster on a CPU than sines and cosines.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rearrange(rope, "n half -> n 1 half")).flatten(-2).to(x.dtype)


def _heads(width: int, x: Tensor, *projections: torch.nn.Module) -> list[Float[Tensor, "b n k h"]]:
    return [rearrange(to(x), "b n (k h) -> b n k h", h=width) for to in projections]


class LocalProcessor(flux.FluxAttnProcessor):
    """Joint attention of a double-stream block, :eq:`eq-joint`: stock, or `attend_full` if given `local_rope`."""

    def __call__(
        self,
        attn: flux.FluxAttention,
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
        q = torch.cat([attn.norm_added_q(text[0]), attn.norm_q(image[0])], dim=1)
        k = torch.cat([attn.norm_added_k(text[1]), attn.norm_k(image[1])], dim=1)
        q, k, v = rotate(q, local_rope), rotate(k, local_rope), torch.cat([text[2], image[2]], dim=1)
        out = attend_full(*(rearrange(z, "b n k h -> b k n h") for z in (q, k, v)))
        words, pixels = rearrange(out, "b k n h -> b n (k h)").tensor_split([text[0].shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](pixels)), attn.to_add_out(words)


class InterleavedSingleBlock(flux.FluxSingleTransformerBlock):
    """Flux's single-stream block, :eq:`eq-single`; given `pairs`, each is modulated by its own row, and sees all."""

    def forward(
        self,
        hidden_states: Float[Tensor, "b n d"],
        encoder_hidden_states: Any,
        temb: Float[Tensor, "b *p d"],
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        pairs: Ragged | None = None,
        causal: bool = False,
        past: KeyValue | None = None,
    ) -> Any:
        """Stock without `pairs`; with them global attention over all and `past`, and this sequence's keys and values.

        One entry, so that FSDP and compile see one block.
        """
        if pairs is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=-1)  # b p d: rows, not tokens
        x, a, rope = self.norm.norm(hidden_states), self.attn, image_rotary_emb
        x = pairs.per_pair(lambda x, shift, scale: torch.addcmul(shift, x, scale), [x], [shift, 1 + scale])  # b n d
        q, k, v = _heads(a.head_dim, x, a.to_q, a.to_k, a.to_v)
        q, k = rotate(a.norm_q(q), rope), rotate(a.norm_k(k), rope)
        q, k, v = (rearrange(z, "b n k h -> b k n h") for z in (q, k, v))
        keys, values = k, v
        if past is not None:
            old = (x.expand(len(q), -1, -1, -1) for x in past)
            keys, values = (torch.cat(both, dim=2) for both in zip(old, (k, v), strict=True))
        out = attend_causal(q, keys, values, pairs.lengths) if causal else attend_full(q, keys, values)
        out = rearrange(out, "b k n h -> b n (k h)")
        out = self.proj_out(torch.cat([out, self.act_mlp(self.proj_mlp(x))], dim=-1))  # b n d
        return pairs.per_pair(torch.addcmul, [hidden_states, out], [gate]), (k, v)


class InterleavedFluxTransformer(flux.FluxTransformer2DModel):
    """Flux over several image-text pairs with hybrid attention masking (paper, section 3.1).

    `forward` is inherited: one picture, stock. `forward_pairs` takes groups of pairs. Loads from and saves to
    the same folders as the stock class; LoRA adapters and gradient checkpointing work as there.
    """

    _no_split_modules = ["FluxTransformerBlock", "InterleavedSingleBlock"]  # noqa: RUF012
    _repeated_blocks = ["FluxTransformerBlock", "InterleavedSingleBlock"]  # noqa: RUF012

    @wraps(flux.FluxTransformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature
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
        """Velocity of every pair, each at its own noise level, in the order and shapes of the groups' latents.

        Groups have equal batch sizes and ragged token counts. If `causal`, pair i sees pairs <= i only (by index), else
        every pair every pair; all see the `cache`, whose pairs come before theirs. `guidance` is the scale told to a
        guidance-distilled base, ignored by others. ValueError if it is missing, indices repeat or precede the cache, or
        the cache is of another model.
        """
        pairs = Ragged(groups)
        if cache is not None and cache.model != id(self):
            theirs, ours = len(cache.blocks), len(self.single_transformer_blocks)
            raise ValueError(f"a cache of another model, of {theirs} blocks, for one of {ours}: encode it again")
        if cache is not None and pairs.index[0] <= cache.last:
            raise ValueError(f"pair {pairs.index[0]} does not come after the cached pair {cache.last}")
        x, tembs = self._blocks(groups, pairs, causal, cache, guidance)
        return [self._head(x, g, t) for x, g, t in zip(pairs.scatter(x), groups, tembs, strict=True)]

    def encode_context(
        self, groups: list[PairGroup], causal: bool = True, guidance: float | None = None
    ) -> ContextCache:
        """Run context pairs once and keep their keys and values for `forward_pairs(..., cache=)`.

        With `causal`, pairs run later against the cache equal the joint causal forward; without, the context
        sees itself in both directions but not the pairs to come. Arguments and errors as in `forward_pairs`.
        """
        pairs, kept = Ragged(groups), list[KeyValue]()
        self._blocks(groups, pairs, causal, None, guidance, kept)
        return ContextCache(kept, pairs.index[-1], id(self))

    def stock(self) -> flux.FluxTransformer2DModel:
        """A stock `FluxTransformer2DModel` around the very same parameters, for pipelines and for saving."""
        with torch.device("meta"):
            model = flux.FluxTransformer2DModel.from_config(self.config)
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
        """Tokens after all blocks, and the groups' conditioning; `kept` takes every global block's keys and values."""
        tembs = [self.condition(group, guidance) for group in groups]  # b p d
        x = pairs.gather([self._local(group, temb) for group, temb in zip(groups, tembs, strict=True)])  # b n d
        temb = torch.stack([tembs[g][:, j] for g, j in pairs.order], dim=1)  # b p d
        rope = self._rope([(groups[g], k) for k, (g, _) in zip(pairs.index, pairs.order, strict=True)])
        for i, block in enumerate(self.single_transformer_blocks):
            past = cache.blocks[i] if cache is not None else None
            x, key_value = self._run(block, x, None, temb, rope, None, pairs, causal, past)
            if kept is not None:
                kept.append(key_value)
        return x, tembs

    def condition(self, group: PairGroup, guidance: float | None = None) -> Float[Tensor, "b p d"]:
        """What modulates each pair's blocks: its noise level, its pooled caption, and the guidance."""
        times = [group.sigma.flatten().float() * 1000]
        if self.config["guidance_embeds"]:
            if guidance is None:
                raise ValueError("this model is guidance-distilled; give `guidance`, for FLUX.1-dev 3.5")
            times.append(torch.full_like(times[0], guidance * 1000))
        return self.time_text_embed(*times, group.pooled.flatten(0, 1)).unflatten(0, group.sigma.shape)

    def _local(self, group: PairGroup, temb: Float[Tensor, "b p d"]) -> Float[Tensor, "b p l d"]:
        image = self.x_embedder(rearrange(group.latents, "b p s c -> (b p) s c"))  # (b p) s d
        text = self.context_embedder(rearrange(group.text, "b p t e -> (b p) t e"))  # (b p) t d
        rows = rearrange(temb, "b p d -> (b p) d")
        rope = self._rope([(group, 0)])  # a pair alone: its index cancels
        for block in self.transformer_blocks:
            text, image = self._run(block, image, text, rows, None, {"local_rope": rope})
        return torch.cat([text, image], dim=1).unflatten(0, group.sigma.shape)

    def _rope(self, places: list[tuple[PairGroup, int]]) -> Rope:
        """Of pairs at their indices; words lie at y = x = 0."""
        ids = [torch.cat([g.ids.new_zeros(g.text.shape[2], 2), g.ids]) for g, _ in places]  # l 2
        ids = [F.pad(yx, (1, 0), value=float(index)) for yx, (_, index) in zip(ids, places, strict=True)]
        cos, sin = self.pos_embed(torch.cat(ids))  # n h, each angle twice
        return torch.complex(cos[:, ::2].float(), sin[:, ::2].float())

    def _head(self, x: Float[Tensor, "b p l d"], group: PairGroup, temb: Float[Tensor, "b p d"]) -> Tensor:
        image = rearrange(x[:, :, group.text.shape[2] :], "b p s d -> (b p) s d")
        out = self.proj_out(self.norm_out(image, rearrange(temb, "b p d -> (b p) d")))
        return out.unflatten(0, group.sigma.shape)

    def _run(self, block: torch.nn.Module, *args: Any) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)  # type: ignore[misc]
        return block(*args)
