"""AdamW that turns the update of a matrix into its nearest orthogonal one: Muon (Jordan et al. 2024), in its later form
(Liu et al. 2025, arXiv 2502.16982), where both kinds of update have about the same size and share one learning rate.

A gradient's matrix is dominated by few directions; with all its singular values made 1 the others learn as fast.
`torch.optim.Muon` does this in bfloat16, which a CPU without that arithmetic does many times slower than a training step.

Try it:  python -m pytest tests/test_muon.py
"""
from __future__ import annotations

import torch
from torch import nn

NARROW = 32  # what reads or gives no more numbers than that (an action; LoRA) is left to AdamW, as embeddings and norms are
SIZE = 0.4  # root mean square of a square matrix's update, of the learning rate; AdamW's is 0.2 to 0.4


class Muon(torch.optim.AdamW):
    """For linear maps and convolutions, whose kernels are read as matrices (out, in · k · k); AdamW for the rest."""

    def __init__(self, model, lr, weight_decay, momentum=0.95):
        network = getattr(model, "unet", model)  # of a world model the U-Net alone: its pose came out worse (ABLATIONS.md)
        weights = [module.weight for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        matrices = {weight for weight in weights if weight.requires_grad and min(weight.flatten(1).shape) > NARROW}
        groups = [{"params": [p for p in model.parameters() if p.requires_grad and (p in matrices) == orthogonal],
                   "orthogonal": orthogonal} for orthogonal in (False, True)]
        super().__init__([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay)
        self.momentum = momentum

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"] if group["orthogonal"] else ():
                if weight.grad is None:
                    continue
                if not self.state[weight]:  # "step": AdamW looks for it in a state that it loads
                    self.state[weight] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(weight)}
                trace = self.state[weight]["momentum"]
                trace.mul_(self.momentum).add_(weight.grad)
                update = orthogonal((weight.grad + self.momentum * trace).flatten(1)).view_as(weight)
                size = SIZE * max(weight.flatten(1).shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size * group["lr"])
                weight.grad = None  # AdamW has nothing to do here
        super().step()


def orthogonal(matrix) -> torch.Tensor:
    """(M, N) -> the same singular vectors, singular values (but the smallest) between 0.7 and 1.2: five Newton-Schulz
    iterations of a quintic whose coefficients (Jordan's) lift small values fast."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.7750 * gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
