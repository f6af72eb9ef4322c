from pathlib import Path

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from cinema.bench_planner import dense_pairs
from cinema.training.loop import HalfPrecision
from cinema.training.stories import run_again
from cinema.transformer import InterleavedFluxTransformer, PairGroup

ATOL = 1e-5  # float32 sums in another order; outputs are of order 1
RAGGED = [[3, 1], [0], [2, 4]]  # indices of three groups, out of order on purpose


def groups() -> list[PairGroup]:
    """Five pairs in three folds, with other sizes and other text lengths."""
    sizes = [(2, 3, 5), (4, 8, 7), (1, 2, 5)]
    return [tiny.group(index, *size) for index, size in zip(RAGGED, sizes, strict=True)]


def call_stock(model: FluxTransformer2DModel, group: PairGroup, pair: int) -> Tensor:
    return model.forward(
        hidden_states=group.latents[:, pair],
        encoder_hidden_states=group.text[:, pair],
        pooled_projections=group.pooled[:, pair],
        timestep=group.sigma[:, pair],
        guidance=torch.full(group.sigma[:, pair].shape, 3.5),
        img_ids=torch.cat([torch.zeros(len(group.ids), 1), group.ids], dim=1),
        txt_ids=torch.zeros(group.text.shape[2], 3),
        return_dict=False,
    )[0]


def by_index(groups: list[PairGroup], outs: list[Tensor]) -> dict[int, Tensor]:
    return {int(k): out[:, j] for g, out in zip(groups, outs, strict=True) for j, k in enumerate(g.index)}


def gradients(model: torch.nn.Module, outs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(sum(x.square().sum() for x in outs), list(model.parameters())))


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 7])
def test_one_pair_equals_stock_flux(index: int, tmp_path: Path) -> None:
    FluxTransformer2DModel.from_config(tiny.transformer().config).save_pretrained(tmp_path)
    stock = FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    ours = InterleavedFluxTransformer.from_pretrained(tmp_path).eval()
    group = tiny.group([index])
    expected = call_stock(stock, group, 0)
    for causal in (False, True):
        out = ours.forward_pairs([group], causal=causal, guidance=3.5)[0]
        assert torch.allclose(out[:, 0], expected, atol=ATOL)
    assert torch.equal(call_stock(ours, group, 0), expected)  # the inherited forward


@pytest.mark.parametrize("mode", ["global", "causal"])
def test_folds_equal_the_dense_mask_reference_with_gradients(mode: str) -> None:
    model, ragged = tiny.transformer(), groups()
    outs = model.forward_pairs(ragged, causal=mode == "causal", guidance=3.5)
    assert [x.shape for x in outs] == [g.latents.shape for g in ragged]
    expected = dict(enumerate(dense_pairs(model, ragged, mode == "causal", 3.5)))
    mine = by_index(ragged, outs)
    assert all(torch.allclose(mine[k], expected[k], atol=ATOL) for k in range(5))
    pairs = zip(gradients(model, outs), gradients(model, list(expected.values())), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4 * max(1.0, b.abs().max().item())) for a, b in pairs)  # sums of 200 terms


@torch.no_grad()
def test_grouping_does_not_matter() -> None:
    model, whole = tiny.transformer(), tiny.group([0, 1, 2, 3])
    outs = model.forward_pairs([whole], causal=True, guidance=3.5)[0]
    parts = [
        PairGroup(
            *(x[:, p] for x in (whole.latents, whole.text, whole.pooled, whole.sigma)), whole.ids, torch.tensor(p)
        )
        for p in ([2, 0], [1, 3])
    ]
    first, second = model.forward_pairs(parts, causal=True, guidance=3.5)
    assert torch.allclose(outs[:, [2, 0]], first, atol=ATOL) and torch.allclose(outs[:, [1, 3]], second, atol=ATOL)


@torch.no_grad()
def test_causal_pairs_do_not_see_the_future_and_global_pairs_do() -> None:
    model, a, b = tiny.transformer(), tiny.group([0, 1, 2]), tiny.group([0, 1, 2])
    b.latents[:, 2] += 1.0
    for causal in (True, False):
        x, y = (model.forward_pairs([g], causal=causal, guidance=3.5)[0] for g in (a, b))
        assert torch.allclose(x[:, :2], y[:, :2], atol=ATOL) == causal
        assert not torch.allclose(x[:, 2], y[:, 2], atol=ATOL)


@torch.no_grad()
def test_each_pair_has_its_own_noise_level() -> None:
    model, a, b = tiny.transformer(), tiny.group([0, 1]), tiny.group([0, 1])
    b.sigma[:, 1] = 1 - b.sigma[:, 1]
    x, y = (model.forward_pairs([g], causal=True, guidance=3.5)[0] for g in (a, b))
    assert torch.equal(x[:, 0], y[:, 0]) and not torch.allclose(x[:, 1], y[:, 1], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])  # a cache of one story serves any batch
def test_cache_equals_recomputation(batch: int) -> None:
    model = tiny.transformer()
    past, new = [tiny.group([2, 0], 2, 3, batch=batch), tiny.group([1], 1, 2, batch=batch)], tiny.group([3, 4], 4, 8)
    cache = model.encode_context(past, guidance=3.5)
    assert cache.tokens == 2 * (6 + 5) + 2 + 5 and cache.last == 2
    out = model.forward_pairs([new], causal=True, cache=cache, guidance=3.5)[0]
    spread = [PairGroup(*(x.expand(2, *x.shape[1:]) for x in _floats(g)), g.ids, g.index) for g in past]
    expected = model.forward_pairs([*spread, new], causal=True, guidance=3.5)[2]
    assert torch.allclose(out, expected, atol=ATOL)


@torch.no_grad()
def test_context_sees_itself_in_both_directions_unless_it_is_causal() -> None:
    model, past = tiny.transformer(), [tiny.group([0, 1, 2])]
    causal, both = (model.encode_context(past, causal=causal, guidance=3.5) for causal in (True, False))
    pair = 6 + 5  # tokens
    for i, (seen, free) in enumerate(zip(causal.blocks, both.blocks, strict=True)):
        assert torch.allclose(seen[0], free[0], atol=ATOL) == (i == 0)  # the first block's keys come before attention
        assert torch.allclose(seen[0][:, :, -pair:], free[0][:, :, -pair:], atol=ATOL) == (i < 2)  # the last sees all
    with pytest.raises(ValueError, match="pair 2 does not come after"):
        model.forward_pairs([tiny.group([2])], causal=True, cache=causal, guidance=3.5)
    with pytest.raises(ValueError, match="a cache of another model, of 3 blocks, for one of 3: encode it again"):
        tiny.transformer().forward_pairs([tiny.group([9])], causal=True, cache=causal, guidance=3.5)


def _floats(group: PairGroup) -> tuple[Tensor, ...]:
    return group.latents, group.text, group.pooled, group.sigma


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, ragged = tiny.transformer().train(), groups()
    plain = gradients(model, model.forward_pairs(ragged, causal=True, guidance=3.5))
    calls: list[object] = []
    model.enable_gradient_checkpointing()
    checkpoint = model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda block, *args: (calls.append(block), checkpoint(block, *args))[1]
    again = gradients(model, model.forward_pairs(ragged, causal=True, guidance=3.5))
    assert len(calls) == 3 * 2 + 3  # every double block once per group, every single block once
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradient_checkpointing_works_in_half_precision() -> None:
    class Learner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = tiny.transformer().train()

        def forward(self) -> list[Tensor]:
            halves = [x.bfloat16() for g in groups() for x in _floats(g)[:3]]
            pairs = (PairGroup(*halves[3 * i : 3 * i + 3], g.sigma, g.ids, g.index) for i, g in enumerate(groups()))
            return self.transformer.forward_pairs(list(pairs), causal=True, guidance=3.5)

    learner = Learner()
    plain = gradients(learner.transformer, HalfPrecision(learner)())
    learner.transformer.enable_gradient_checkpointing(run_again)
    again = gradients(learner.transformer, HalfPrecision(learner)())
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_lora_takes_effect_and_gradients() -> None:
    model, ragged = tiny.transformer().train(), groups()
    before = model.forward_pairs(ragged, guidance=3.5)
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "proj_mlp", "proj_out", "norm.linear", "x_embedder"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    after = model.forward_pairs(ragged, guidance=3.5)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    sum(x.square().sum() for x in after).backward()
    lora = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert lora and all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.values())
    group = tiny.group([0])
    with torch.no_grad():  # and the stock forward agrees under the adapter, too
        ours = model.forward_pairs([group], guidance=3.5)[0][:, 0]
        assert torch.allclose(ours, call_stock(model, group, 0), atol=5e-5)  # random adapters: outputs of order 10


def test_bfloat16_is_close_to_float32() -> None:
    model, ragged = tiny.transformer(), groups()
    expected = model.forward_pairs(ragged, causal=True, guidance=3.5)
    model = tiny.transformer()
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()}, assign=True)
    halves = [x.bfloat16() for g in ragged for x in _floats(g)[:3]]
    ragged = [PairGroup(*halves[3 * i : 3 * i + 3], g.sigma, g.ids, g.index) for i, g in enumerate(ragged)]
    outs = model.forward_pairs(ragged, causal=True, guidance=3.5)
    sum(x.float().square().sum() for x in outs).backward()
    for out, exact in zip(outs, expected, strict=True):
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()  # 8 bits, five blocks


def test_stock_shares_the_parameters_and_loads_everywhere(tmp_path: Path) -> None:
    ours = tiny.transformer()
    stock = ours.stock()
    assert type(stock) is FluxTransformer2DModel
    assert all(a is b for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    ours.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), loaded.parameters(), strict=True))


def test_bad_groups_are_refused_with_their_numbers() -> None:
    model = tiny.transformer()
    with pytest.raises(ValueError, match=r"distinct indices.*\[0, 1, 1\]"):
        model.forward_pairs([tiny.group([0, 1]), tiny.group([1])], guidance=3.5)
    with pytest.raises(ValueError, match="give `guidance`"):
        model.forward_pairs([tiny.group([0])])
    cache = model.encode_context([tiny.group([2])], guidance=3.5)
    with pytest.raises(ValueError, match="pair 1 does not come after the cached pair 2"):
        model.forward_pairs([tiny.group([1])], cache=cache, guidance=3.5)
    tiny.transformer(guidance=False).forward_pairs([tiny.group([0])], guidance=3.5)  # ignored there
