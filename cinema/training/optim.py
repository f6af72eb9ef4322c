"""Optimisers: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""

from typing import Any

import torch
from torch import nn

from cinema.training.config import TrainConfig

BIAS_RATE = 30.0


def make_optimizers(config: TrainConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Optimisers of a run; each group carries `base_lr`, which the loop multiplies by the schedule.

    Muon orthogonalises the update of a matrix. It suits the dense matrices inside transformer blocks; embeddings,
    modulation, norms and the output layer stay with AdamW.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in trained.items() if config.muon_lr and is_block_matrix(n, p)}
    biases = {n: p for n, p in trained.items() if "relative_attention_bias" in n}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained.items() if n not in matrices and n not in biases], "lr": config.lr}
    ]
    if biases:  # logits that must grow to 5 or so before a head looks at one neighbour; T5's own optimiser was relative
        groups.append({"params": list(biases.values()), "lr": BIAS_RATE * config.lr, "weight_decay": 0.0})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    ]
    if matrices and config.muon_lr:
        optimizers.append(
            torch.optim.Muon(
                matrices.values(),
                lr=config.muon_lr,
                momentum=0.95,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """True for the dense matrices inside blocks; modulation and embeddings are excluded."""
    odd = ("norm", "scale_shift", "conv_shortcut")
    return parameter.ndim == 2 and "blocks." in name and not any(x in name for x in odd)
