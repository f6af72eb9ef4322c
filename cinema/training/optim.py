"""Optimisers: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""

from typing import Any

import torch
from torch import Tensor, nn

from cinema.training.config import TrainConfig

BIAS_RATE = 30.0


def make_optimizers(config: TrainConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Optimisers of a run; each group carries `base_lr`, which the loop multiplies by the schedule.

    Muon orthogonalises the update of a matrix. It suits the dense matrices inside transformer blocks; embeddings,
    modulation, norms and the output layer stay with AdamW.
    """
    matrices: list[Tensor] = []
    biases: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "blocks." in name
        if config.muon_lr and inside and not any(x in name for x in ("norm", "scale_shift", "conv_shortcut")):
            matrices.append(parameter)
        else:
            (biases if "relative_attention_bias" in name else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": others, "lr": config.lr}]
    if biases:  # logits that must grow to 5 or so before a head looks at one neighbour; T5's own optimiser was relative
        groups.append({"params": biases, "lr": BIAS_RATE * config.lr, "weight_decay": 0.0})
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=config.betas, weight_decay=decay, fused=True)
    ]
    if config.muon_lr and matrices:
        muon: Any = {"momentum": 0.95, "weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, **muon))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers
