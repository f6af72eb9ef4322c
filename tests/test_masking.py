from itertools import product

import pytest
import torch
from einops import rearrange
from torch.nn.attention.flex_attention import flex_attention

import cinema.masking
from cinema.masking import attend_causal, attend_dense, attend_full, pair_mask

LENGTHS = [3, 1, 4]


def qkv(length: int = 8, batch: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, length, 16, generator=g, requires_grad=True) for _ in range(3)]


def test_masks_say_who_sees_whom() -> None:
    pair = [0, 0, 0, 1, 2, 2, 2, 2]
    for mode, rule in {"local": int.__eq__, "causal": int.__ge__, "global": lambda i, j: True}.items():
        mask = pair_mask(LENGTHS, mode)
        assert all(bool(mask[i, j]) == rule(pair[i], pair[j]) for i, j in product(range(8), repeat=2))


@pytest.mark.parametrize("short", [0, 600**2])  # both kernels
def test_attention_equals_the_dense_reference(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cinema.masking, "SHORT", short)
    inputs = qkv()
    for mode, ours in {"global": attend_full(*inputs), "causal": attend_causal(*inputs, LENGTHS)}.items():
        reference = attend_dense(*inputs, pair_mask(LENGTHS, mode))
        assert torch.allclose(ours, reference, atol=1e-5)  # float32 sums in another order
        for mine, its in zip(
            torch.autograd.grad(ours.square().sum(), inputs),
            torch.autograd.grad(reference.square().sum(), inputs),
            strict=True,
        ):
            assert torch.allclose(mine, its, atol=1e-5)


def test_local_attention_is_a_fold_into_the_batch() -> None:
    inputs = qkv(length=6)
    folded = attend_full(*(rearrange(x, "b k (p l) h -> (b p) k l h", p=3) for x in inputs))
    dense = attend_dense(*inputs, pair_mask([2, 2, 2], "local"))
    assert torch.allclose(rearrange(folded, "(b p) k l h -> b k (p l) h", p=3), dense, atol=1e-5)


def test_cached_keys_are_seen_by_every_query() -> None:
    q, k, v = qkv()
    late = attend_causal(q[:, :, 3:], k, v, LENGTHS[1:])
    assert torch.allclose(late, attend_causal(q, k, v, LENGTHS)[:, :, 3:], atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # compiled, it needs a GPU
@pytest.mark.parametrize("past", [0, 4])
def test_block_mask_of_the_gpu_path_equals_the_loop(past: int) -> None:
    q, k, v = (x.detach() for x in qkv())
    lengths = LENGTHS if past == 0 else LENGTHS[2:]
    mask = cinema.masking._block_mask(tuple(lengths), past, torch.device("cpu"))
    out = flex_attention(q[:, :, past:], k, v, block_mask=mask)
    assert torch.allclose(out, attend_causal(q[:, :, past:], k, v, lengths), atol=1e-5)
