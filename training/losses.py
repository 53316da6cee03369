"""Loss terms. Everything is on [-1, 1]; every term returns one scalar."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class SqueezeNetFeatures(nn.Module):
    """Distance of SqueezeNet 1.1 features: unit length over channels, squared difference, mean over places and layers.

    The Caffe weights (input BGR, 0..255 minus the ImageNet means; weights/README.md), not torchvision's: the heads of the
    `lpips` package do not fit them, so the layers count alike.
    """

    mean: Tensor
    layers = (1, 4, 7, 9, 10, 11, 12)

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torchvision.models import squeezenet1_1

        network = squeezenet1_1(weights=None)
        network.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
        self.features = network.features
        self.register_buffer("mean", torch.tensor([103.939, 116.779, 123.68])[None, :, None, None])
        for module in self.features.modules():  # in place, ReLU would overwrite the features that are compared
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.eval().requires_grad_(False)

    def extract(self, pictures: Tensor) -> list[Tensor]:
        x = (pictures.flip(1) + 1) * 127.5 - self.mean
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.layers:
                found.append(x.float() / x.float().norm(dim=1, keepdim=True).clamp_min(1e-6))
        return found

    def forward(self, decoded: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.extract(target)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(self.extract(decoded), wanted, strict=True)]).mean()


class ShiftTolerantLPIPS(nn.Module):
    """ST-LPIPS (Ghildyal and Liu, ECCV 2022) with the AlexNet trunk, from the package that ships its weights."""

    def __init__(self) -> None:
        super().__init__()
        from stlpips_pytorch import stlpips

        self.network = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False).requires_grad_(False)

    def forward(self, decoded: Tensor, target: Tensor) -> Tensor:
        return self.network(decoded, target).mean()
