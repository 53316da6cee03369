"""What takes the steps: AdamW, or Muon for the convolutions between the first and the last one and AdamW for the rest."""

from collections.abc import Iterable
from typing import Any

import torch
from config import Config
from torch import Tensor, nn


def build_optimizers(network: nn.Module, c: Config) -> list[torch.optim.Optimizer]:
    """For all parameters of a network that is on its device and in channels_last."""
    parameters = [*network.parameters()]
    found: list[torch.optim.Optimizer] = []
    if c.optimizer == "muon":
        weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == 1][1:-1]
        found.append(ConvMuon(weights, c.lr, c.weight_decay))
        parameters = [p for p in parameters if not any(p is weight for weight in weights)]
    return [*found, torch.optim.AdamW(parameters, lr=c.lr, betas=(0.9, 0.99), weight_decay=c.weight_decay, fused=True)]


class ConvMuon(torch.optim.Muon):
    """torch's Muon, momentum made orthogonal (Jordan et al. 2024), which takes matrices only, on views of kernels as (out, kernel * in).

    Its steps are as long as AdamW's would be, so that one learning rate serves both.
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        self.weights = [*weights]
        self.matrices = [nn.Parameter(matrix(weight.detach())) for weight in self.weights]
        super().__init__(self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        for weight, flat in zip(self.weights, self.matrices, strict=True):
            assert flat.data_ptr() == weight.data_ptr(), "expected weights in channels_last that stayed where they were"
            flat.grad = None if weight.grad is None else matrix(weight.grad)
        return super().step(closure)


def matrix(weight: Tensor) -> Tensor:
    """(out, in, h, w) as (out, h * w * in): a view if it is in channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)
