"""Loss terms. Pictures are (N, 3, H, W) on [-1, 1]; every term returns one scalar, zero for equal pictures."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# ---------------------------------------------------------------- pixels


def weighted(error: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of the error; with `weight` (N, 1, H, W) a weighted one, so that a map of equal weights changes nothing."""
    return error.mean() if weight is None else (error * weight).mean() / weight.mean()


def l1(decoded: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    return weighted((decoded - target).abs(), weight)


def mse(decoded: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The paper's pixel term (equation 1)."""
    return weighted((decoded - target).square(), weight)


def charbonnier(decoded: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """L1 that is smooth at zero: sqrt(d^2 + e^2) - e with e = 1/1000."""
    return weighted(((decoded - target).square() + 1e-6).sqrt(), weight) - 1e-3


def frequency(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean modulus of the difference of the spectra (orthonormal real FFT), so that fine and coarse count alike."""
    return torch.fft.rfft2((decoded - target).float(), norm="ortho").abs().mean()


def ms_ssim(decoded: Tensor, target: Tensor) -> Tensor:
    """1 - MS-SSIM of torchmetrics, in as many of the five scales as it allows a crop (all from 176 px on)."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as similarity

    betas = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    side = min(decoded.shape[-2:])
    scales = max(n for n in range(1, 6) if n == 1 or side // (n - 1) ** 2 > 10)  # torchmetrics' own bound
    kept = tuple(beta / sum(betas[:scales]) for beta in betas[:scales])
    return 1 - similarity(decoded.float(), target, data_range=2.0, betas=kept, normalize="relu")


def colour(decoded: Tensor, target: Tensor) -> Tensor:
    """L1 of the means over 8x8 pixels: what a latent's colour should be, whatever its texture."""
    return nn.functional.avg_pool2d(decoded - target, 8).abs().mean()


TOO_LITTLE = 0.7


def detail(decoded: Tensor, target: Tensor) -> Tensor:
    """Distance of the local contrast (rms over 8x8 px) of what is near Nyquist, across, down and diagonally, at full and at half resolution.

    Pixel terms prefer no detail to detail at a wrong place; this one asks for as much as the truth has, wherever exactly it lies.
    Contrast is skewed, so its median, which L1 asks for, holds less power than it has on average: too little weighs
    TOO_LITTLE, too much the rest of 1 (the 0.7 quantile of a lognormal with a spread of 0.5 has its mean power).
    """
    gaps = [b - a for a, b in zip(_contrasts(decoded), _contrasts(target), strict=True)]
    return 2 * torch.stack([torch.maximum(TOO_LITTLE * gap, (TOO_LITTLE - 1) * gap).mean() for gap in gaps]).mean()


def _contrasts(x: Tensor) -> list[Tensor]:
    found = []
    x = x.float().mean(1, keepdim=True)
    for _ in range(2):
        for high in ((-2,), (-1,), (-2, -1)):
            band = x
            for dim in (-2, -1):  # no convolution: autocast would round what is small beside its neighbours
                left, middle, right = (band.narrow(dim, i, band.shape[dim] - 2) for i in range(3))
                band = (2 * middle + (left + right) * (-1 if dim in high else 1)) / 4
            found.append((nn.functional.avg_pool2d(band.square(), min(8, *band.shape[-2:]), 4) + 1e-6).sqrt())
        x = nn.functional.avg_pool2d(x, 2)
    return found


def lattice(decoded: Tensor, target: Tensor) -> Tensor:
    """Rms of a pattern that the error repeats: its means over windows of 8 px with a period of 2 px, over 64 px with one of 8 px, a latent.

    A few dots that the pixel shuffles' phases repeat are the cheapest way to please `detail`, and seen as a mesh. Half the sum of both.
    """
    found = decoded.new_zeros(())
    for period, window in ((2, 4), (8, 8)):
        phases = nn.functional.pixel_unshuffle((decoded - target).float(), period)
        size = min(window, *phases.shape[-2:])
        means = nn.functional.avg_pool2d(phases, size, max(1, size // 2)).unflatten(1, (-1, period**2))
        found = found + ((means.var(2, unbiased=False) + 1e-6).sqrt() - 1e-3).mean() / 2
    return found


def temporal(decoded: Tensor, target: Tensor, frames: int) -> Tensor:
    """The paper's L_TAE, which it names and never defines (FACTS 11.3): mean |d decoded - d target| over consecutive frames.

    Pictures are (clips * frames, 3, H, W); d is the difference from one frame of a clip to the next. Zero for single pictures.
    """
    if frames == 1:
        return decoded.new_zeros(())
    return (decoded - target).unflatten(0, (-1, frames)).diff(dim=1).abs().mean()


WEIGHTED = {term.__name__: term for term in (l1, mse, charbonnier)}  # take a map of weights
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {term.__name__: term for term in (frequency, ms_ssim, colour, detail, lattice)}
PERCEPTUAL = ("lpips", "stlpips", "squeeze")
TERMS = {"pixels": (*WEIGHTED, *PLAIN), "perceptual": PERCEPTUAL, "temporal": ("temporal",), "encoder": ("reencode",), "colours": ("flat",)}

# ---------------------------------------------------------------- features


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


class LPIPS(nn.Module):
    """LPIPS (Zhang et al. 2018) on VGG16, the paper's perceptual term, from the `lpips` package.

    Raises:
        RuntimeError: torchvision's VGG16 weights, which the package does not carry, cannot be downloaded.
    """

    def __init__(self) -> None:
        super().__init__()
        import lpips

        try:
            self.network = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
        except OSError as error:  # no network: urllib's errors are OSErrors
            raise RuntimeError(
                f"LPIPS needs the weights of torchvision's VGG16, which cannot be downloaded here ({error}). Without a network use "
                "the term stlpips, whose weights come with its package, or squeeze, with weights given by squeezenet="
            ) from error

    def forward(self, decoded: Tensor, target: Tensor) -> Tensor:
        return self.network(decoded, target).mean()


def perceptual(name: str, squeezenet: str | None = None) -> nn.Module:
    """The network of a perceptual term.

    Raises:
        RuntimeError: its weights are not at hand; the message says which terms need none.
    """
    if name == "lpips":
        return LPIPS()
    if name == "stlpips":
        return ShiftTolerantLPIPS()
    if squeezenet is None:
        raise RuntimeError("the term squeeze needs squeezenet=PATH, the Caffe weights of SqueezeNet 1.1; the term stlpips needs no file")
    return SqueezeNetFeatures(Path(squeezenet))
