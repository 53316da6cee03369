"""Feature networks for distances of distributions, and the one resize in front of all of them.

The resize, the same for both sides: antialiased bicubic (a = -0.5, as Pillow's and clean-fid's) in float32, straight to the
network's square input, whatever the aspect ratio, then clamped to 0..255 and rounded to bytes. Nothing is cropped.
Only Inception features may be called FID and KID; `Features.title` says what another network's distance is of.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fast_latent_decoders.evaluation.backbones import INCEPTION, Unavailable, fetch, needing


@dataclass(frozen=True)
class Features:
    """`extract`: uint8 pictures (N, 3, H, W) of any size to float32 features (N, d) on the CPU."""

    name: str
    title: str  # completes "distance on ...", as in tables
    d: int
    size: int  # px, the network's square input
    network: Callable[[Tensor], Tensor]  # uint8 (N, 3, size, size) to (N, d)
    device: str = "cpu"
    batch: int = 8  # pictures at a time, which bounds memory; networks are in eval mode, so values do not depend on it

    def extract(self, pictures: Tensor) -> Tensor:
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"expected uint8 pictures (N, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
        with torch.inference_mode():
            parts = [self.network(resize(part.to(self.device), self.size)).float().cpu() for part in pictures.split(self.batch)]
        return torch.cat(parts) if parts else torch.zeros(0, self.d)

    def distance_title(self, kind: str) -> str:
        """Of "frechet" or "kernel": FID and KID for Inception, what it is for anything else."""
        if self.name == "inception":
            return {"frechet": "FID", "kernel": "KID"}[kind]
        return f"{ {'frechet': 'Frechet', 'kernel': 'kernel'}[kind]} distance on {self.title}"


def resize(pictures: Tensor, size: int) -> Tensor:
    """The one resize: uint8 (N, 3, H, W) to uint8 (N, 3, size, size); pictures of that size stay as they are."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    resized = nn.functional.interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255).round().to(torch.uint8)


def _inception(device: str, weights: Path | None) -> Features:
    """The Inception of the original FID, of torch-fidelity, through torchmetrics; its own resize has nothing left to do."""
    with needing("torch-fidelity"):
        import torch_fidelity  # noqa: F401
    with needing("torchmetrics"):
        from torchmetrics.image.fid import NoTrainInceptionV3
    path = weights or fetch(INCEPTION)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).requires_grad_(False).to(device)
    return Features("inception", "Inception features", 2048, 299, network, device)


def _alexnet_st(device: str, weights: Path | None) -> Features:
    """AlexNet of ST-LPIPS with blur-pooling: its fourth activations, at each place of root mean square 1, averaged over places.

    Brought to one length because the metric, and so its training, sees them so; raw, they are around 0.01 and the kernel of the
    kernel distance would be linear there. The fourth, because on photographs its channels vary most independently: 5 effective
    dimensions, against 3 of the fifth, half of whose channels are always zero. So d = 256 is on the safe side in n < d.
    """
    with needing("stlpips-pytorch"):
        from stlpips_pytorch import stlpips
    whole = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    whole = whole.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)

    def network(pictures: Tensor) -> Tensor:
        x = whole.scaling_layer(pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        y = whole.net(x).relu4
        return (y / y.square().mean(1, keepdim=True).sqrt().clamp_min(1e-10)).mean((2, 3))

    return Features("alexnet-st", "shift-tolerant AlexNet features", 256, 224, network, device)


def _squeezenet(device: str, weights: Path | None) -> Features:
    """SqueezeNet 1.1 with the Caffe weights (BGR, 0..255 less the ImageNet means); its last activations, averaged over places."""
    if weights is None:
        raise Unavailable("SqueezeNet needs a file of weights, SqueezeNet 1.1 from Caffe in torchvision's layout")
    if not Path(weights).is_file():
        raise Unavailable(f"there is no file {weights}")
    with needing("torchvision"):
        from torchvision.models import squeezenet1_1
    from safetensors.torch import load_file

    whole = squeezenet1_1(weights=None)
    whole.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    trunk = whole.features.eval().requires_grad_(False).to(device)
    mean = torch.tensor([103.939, 116.779, 123.68], device=device)[:, None, None]
    return Features("squeezenet", "SqueezeNet features", 512, 227, lambda x: trunk(x.flip(1).float() - mean).mean((2, 3)), device)


NETWORKS: dict[str, Callable[[str, Path | None], Features]] = {
    "inception": _inception,
    "alexnet-st": _alexnet_st,
    "squeezenet": _squeezenet,
}


def open_features(name: str, device: str | torch.device = "cpu", weights: Path | None = None) -> Features | str:
    """A feature network, or why it cannot be had ("not available: ..."); `weights` is a file for those that take one.

    Raises:
        ValueError: there is no network of that name.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, 1)
        raise ValueError(f"no features {name!r}{f', did you mean {near[0]!r}?' if near else ''}; there are {', '.join(NETWORKS)}")
    return _open(name, str(device), weights)


@cache  # of what cannot be had too: it is tried once
def _open(name: str, device: str, weights: Path | None) -> Features | str:
    try:
        return NETWORKS[name](device, weights)
    except Unavailable as reason:
        return str(reason)
