"""Optimisers: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""

import torch
from torch import nn

from cinema.training.config import TrainConfig


def make_optimizers(config: TrainConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Optimisers of a run; each group carries `base_lr`, which the loop multiplies by the schedule.

    Muon orthogonalises the update of a matrix. It suits the dense matrices inside transformer blocks; embeddings,
    modulation, norms and the output layer stay with AdamW.
    """
    matrices = {
        n: p for n, p in model.named_parameters() if p.requires_grad and config.muon_lr and is_block_matrix(n, p)
    }
    rest = [p for n, p in model.named_parameters() if p.requires_grad and n not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
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
