import json
from dataclasses import asdict, replace
from itertools import product

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cinema import masking
from cinema.bench_planner import most_allocated
from cinema.budget import FLUX_1_DEV, Work, flops, parameters, peak_bytes, table, transformer_config
from cinema.cli import main
from cinema.config import FLUX, PHI, PRESETS, SMALL, TOY
from cinema.errors import UserError
from cinema.goldenmem import Layout, coordinates, tokens
from cinema.training.loop import HalfPrecision
from cinema.training.stories import run_again
from cinema.transformer import InterleavedFluxTransformer, PairGroup

CPU = torch.device("cpu")
FIG_4 = {4: 5512, 8: 7824, 12: 8984, 16: 9696, 20: 10280, 24: 10824}  # pairs: tokens printed in the paper
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
WORKS = [
    Work("no"),
    *(Work(mode, again, causal) for mode in ("full", "lora") for again, causal in product((False, True), repeat=2)),
]


def model(width: int, double: int = 2, single: int = 4) -> InterleavedFluxTransformer:
    torch.manual_seed(0)
    return InterleavedFluxTransformer(
        **tiny.transformer_config()
        | {"attention_head_dim": 32, "num_attention_heads": width // 32}
        | {"num_layers": double, "num_single_layers": single, "axes_dims_rope": (8, 12, 12)}
    )


def story(layout: Layout, text: int, dtype: torch.dtype) -> list[PairGroup]:
    groups = []
    for side, places in layout.by_level():
        p, ids = len(places), coordinates(side, max(layout.sides))
        shapes = (1, p, tokens(side), tiny.CHANNELS), (1, p, text, tiny.TEXT), (1, p, tiny.POOLED)
        latents, words, pooled = (torch.randn(shape, dtype=dtype) for shape in shapes)
        groups.append(PairGroup(latents, words, pooled, torch.rand(1, p), ids, torch.tensor(places)))
    return groups


def prepare(transformer: InterleavedFluxTransformer, work: Work) -> None:
    if work.train == "lora":
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=work.rank, target_modules=ADAPTED))
    if work.recompute:
        transformer.train().enable_gradient_checkpointing(run_again)


def error_of(outs: list[Tensor]) -> Tensor:
    return torch.stack([out.float().square().mean() for out in outs]).sum()


@pytest.mark.parametrize(("pairs", "printed"), FIG_4.items())
def test_the_command_prints_the_token_counts_of_figure_4(pairs: int, printed: int, tmp_path) -> None:
    file = tmp_path / "budget.json"
    assert main(["budget", "--preset", "flux", "--pairs", str(pairs), "--group", "4", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert (row["naive_tokens"], row["goldenmem_tokens"]) == (1378 * pairs, printed)
    assert list(row) == ["pairs", "naive_tokens", "goldenmem_tokens", "naive_flops", "goldenmem_flops", "peak_bytes"]


def test_parameters_are_those_of_the_model() -> None:
    toy = transformer_config(TOY.keyframes.weights)
    for config in (FLUX_1_DEV, toy, tiny.transformer_config(False), tiny.transformer_config(True)):
        with torch.device("meta"):
            built = FluxTransformer2DModel.from_config(config)
        assert parameters(config) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_flops_are_those_that_torch_counts(work: Work, monkeypatch) -> None:
    monkeypatch.setattr(masking, "SHORT", 0)  # the fused kernel, as on a GPU and on longer stories
    transformer, layout, text = model(64), Layout(6, 6, 3, 2), 7
    prepare(transformer, work := replace(work, rank=4))
    groups = story(layout, text, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(work.train != "no"):
        out = error_of(transformer.forward_pairs(groups, work.causal, None, 3.5))
        if work.train != "no":
            out.backward()
    ours = flops(transformer.config, layout.sides, text, work)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(("width", "sides"), [(128, (16, 16, 25, 25)), (512, (9, 15))])
@pytest.mark.parametrize("work", WORKS, ids=str)
def test_peak_memory_is_what_the_allocator_gives(work: Work, width: int, sides: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(masking, "SHORT", 0)
    layout, text, work = (
        Layout(len(sides), max(sides), 2, len(sides) // 2, max(sides) / min(sides)),
        128,
        replace(work, device="cpu"),
    )
    assert layout.sides == sides
    groups = story(layout, text, torch.bfloat16)

    transformer = model(width).to(torch.float32 if work.train == "full" else torch.bfloat16)
    prepare(transformer, work)
    trained = [p for p in transformer.parameters() if p.requires_grad] if work.train != "no" else []
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.grad = torch.zeros_like(parameter)
    held = [*transformer.parameters(), *(p.detach().clone() for p in trained)]  # and their average
    if work.train == "no":
        measured = most_allocated(
            torch.no_grad()(lambda: transformer.forward_pairs(groups, work.causal, None, 3.5)), CPU
        )
    else:
        optimizer, learner = torch.optim.AdamW(trained, fused=True), HalfPrecision(Learner(transformer))
        optimizer.step()  # its moments are there from now on
        optimizer.zero_grad()
        held += [x for state in optimizer.state.values() for x in state.values()]
        measured = most_allocated(lambda: (error_of(learner(groups, work.causal)).backward(), optimizer.step()), CPU)
    measured += sum(x.nbytes for x in held)
    assert peak_bytes(transformer.config, sides, text, work) == pytest.approx(measured, rel=0.1)


class Learner(torch.nn.Module):
    def __init__(self, transformer: InterleavedFluxTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, groups: list[PairGroup], causal: bool) -> list[Tensor]:
        return self.transformer.forward_pairs(groups, causal, None, 3.5)


@given(pairs=st.integers(1, 96), group=st.integers(1, 96), preset=st.sampled_from([TOY, SMALL, FLUX]))
@settings(max_examples=60, deadline=None)
def test_what_is_counted_is_what_is_built(pairs: int, group: int, preset) -> None:
    chosen = replace(preset.keyframes, memory_group=group, weights=FLUX.keyframes.weights)
    (row,) = table(chosen, [pairs])
    kept, side = min(pairs, group * chosen.memory_levels), chosen.height // 16
    layout = Layout(kept, side, chosen.memory_levels, group, chosen.memory_ratio)
    built = sum(len(places) * (len(coordinates(s, side)) + chosen.text_tokens) for s, places in layout.by_level())
    assert row.goldenmem_tokens == built and row.naive_tokens == pairs * (tokens(side) + chosen.text_tokens)
    assert row.goldenmem_flops <= row.naive_flops
    assert sum(map(tokens, layout.sides)) <= group * tokens(side) / (1 - chosen.memory_ratio**-2)
    assert sorted(i for _, places in layout.by_level() for i in places) == list(range(kept))
    assert sorted(layout.sides, reverse=True) == list(reversed(layout.sides))


@pytest.mark.parametrize("work", [Work(), Work("lora", recompute=True), Work("full", recompute=True)], ids=str)
def test_shared_weights_are_divided_among_processes_and_activations_are_not(work: Work) -> None:
    sides, empty = [25] * 8, peak_bytes(FLUX_1_DEV, [], 128, work)
    eight, alone = (peak_bytes(FLUX_1_DEV, sides, 128, replace(work, shards=n)) for n in (8, 10**12))
    assert peak_bytes(FLUX_1_DEV, [], 128, replace(work, shards=8)) == pytest.approx(empty / 8, rel=1e-6)
    assert alone > 2**30 and eight - alone == pytest.approx(empty / 8, rel=0.11)  # gradients: 2 bytes then, 4 later


def test_a_causal_story_and_adapters_cost_less_and_recomputing_more_but_needs_less_memory() -> None:
    sides, full = [25] * 8, Work("full")
    cost = {
        w: (flops(FLUX_1_DEV, sides, 128, w), peak_bytes(FLUX_1_DEV, sides, 128, w))
        for w in (full, replace(full, causal=True), replace(full, recompute=True), replace(full, train="lora"))
    }
    assert cost[replace(full, causal=True)][0] < cost[full][0]
    assert cost[replace(full, train="lora")] < cost[full]
    again = cost[replace(full, recompute=True)]
    assert again[0] > cost[full][0] and again[1] < cost[full][1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--pairs", "4", "--levels", "9"], "9 levels are too many for 8 patches: level 5 would have none"),
        (["--pairs", "4", "--ratio", "1"], "the ratio between levels is 1.0, it must be above 1"),
        (["--pairs", "4", "--preset", "huge"], "there is no preset 'huge'"),
    ],
)
def test_bad_input_is_one_sentence(given: list[str], said: str, capsys) -> None:
    assert main(["budget", *given]) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.strip().splitlines()) == 1


def test_weights_without_a_configuration_here_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"somebody/something: its transformer/config\.json is not on this machine"):
        table(replace(TOY.keyframes, weights="somebody/something"), [4])


def test_every_preset_has_a_budget() -> None:
    for preset in PRESETS.values():
        first, last = table(preset.keyframes, [1, 48], Work("lora", recompute=True))
        assert first.naive_flops == first.goldenmem_flops and last.naive_flops > 2 * last.goldenmem_flops
        assert asdict(first)["pairs"] == 1 and PHI > 1
