"""Per-picture metrics: decoded against the truth, one value per picture, on the bytes that a saved picture has.

Pictures are uint8 (N, 3, H, W), RGB, 0..255, correctly rounded, both sides of one size: nothing is resized here. Each picture
is measured by itself, so a value does not depend on its batch. Where a value does not exist it is NaN: the picture is smaller
than the metric's windows (`PictureMetric.why_nan`), or, for sharpness, the truth has no fine detail to compare with.
"""

import difflib
import io
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from fast_latent_decoders.evaluation.backbones import Unavailable, fetch, needing, torchvision_url
from fast_latent_decoders.evaluation.info import MetricInfo
from fast_latent_decoders.evaluation.luma import luma, mesh, sharpness

HIGHEST_PSNR = 100.0  # dB; of equal pictures, whose PSNR is infinite and would make every mean infinite
BLUR = 2.0  # px, sigma: agreement looks at what is larger than the texture a decoder makes up

Measure = Callable[[Tensor, Tensor], float]  # of one picture (3, H, W)


METRICS = {
    info.name: info
    for info in (
        MetricInfo("psnr", "PSNR", "higher", "dB"),
        MetricInfo("ssim", "SSIM", "higher", digits=4, smallest=7),
        MetricInfo("ms_ssim", "MS-SSIM", "higher", digits=4, smallest=176),  # torchmetrics' bound: 11 px in each of five scales
        MetricInfo("lpips_alex", "LPIPS (AlexNet)", "lower", digits=4, smallest=31),
        MetricInfo("lpips_vgg", "LPIPS (VGG16)", "lower", digits=4, smallest=16),
        MetricInfo("lpips_squeeze", "LPIPS (SqueezeNet)", "lower", digits=4, smallest=17),
        MetricInfo("stlpips", "ST-LPIPS (AlexNet)", "lower", digits=4, smallest=21),
        # The metric's weights are a list over channels and six scales; with fewer scales they would meet the wrong terms.
        MetricInfo("ssimulacra2", "SSIMULACRA2", "higher", smallest=225),
        MetricInfo("dists", "DISTS", "lower", digits=4, smallest=16),
        MetricInfo("tint_r", "tint red", "zero", "1/255"),
        MetricInfo("tint_g", "tint green", "zero", "1/255"),
        MetricInfo("tint_b", "tint blue", "zero", "1/255"),
        MetricInfo("tint", "mean |tint|", "lower", "1/255"),
        MetricInfo("sharpness", "sharpness", "one", digits=3, smallest=16),
        MetricInfo("mesh", "mesh", "lower", "1/255", smallest=64),
    )
}

AGREEMENT = {
    info.name: info
    for info in (
        MetricInfo("agreement_mae", "agreement, mean difference", "lower", "1/255"),
        MetricInfo("agreement_psnr", "agreement, PSNR", "higher", "dB"),
        MetricInfo("agreement_correlation", "agreement, correlation", "higher", digits=4, smallest=2),
    )
}
METRICS |= AGREEMENT


@dataclass(frozen=True)
class PictureMetric:
    """A metric that can be had: (decoded, truth), both uint8 (N, 3, H, W), to one value per picture."""

    info: MetricInfo
    measure: Measure

    def why_nan(self, height: int, width: int) -> str | None:
        """Why pictures of this size have no value."""
        if min(height, width) >= self.info.smallest:
            return None
        return f"{self.info.title} needs pictures of at least {self.info.smallest} px a side, got {height}x{width}"

    def __call__(self, decoded: Tensor, truth: Tensor) -> list[float]:
        check_pair(decoded, truth)
        if self.why_nan(*decoded.shape[2:]):
            return [math.nan] * len(decoded)
        with torch.inference_mode():
            return [self.measure(a, b) for a, b in zip(decoded, truth, strict=True)]


def check_pair(decoded: Tensor, truth: Tensor) -> None:
    for pictures in (decoded, truth):
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"expected uint8 pictures (N, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
    if decoded.shape != truth.shape:
        raise ValueError(f"expected two sets of one shape, got {tuple(decoded.shape)} against {tuple(truth.shape)}")


def open_metrics(names: Iterable[str], device: str | torch.device = "cpu") -> tuple[dict[str, PictureMetric], dict[str, str]]:
    """The metrics that can be had, and of the others why not ("not available: ..."); their networks go to the device.

    Raises:
        ValueError: a name is not in METRICS.
    """
    metrics, reasons = {}, {}
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1)
            raise ValueError(f"no metric {name!r}{f', did you mean {near[0]!r}?' if near else ''}; there are {', '.join(METRICS)}")
        measure = _open(name, str(device))
        if isinstance(measure, Unavailable):
            reasons[name] = str(measure)
        else:
            metrics[name] = PictureMetric(METRICS[name], measure)
    return metrics, reasons


@cache  # of what cannot be had too: it is tried once
def _open(name: str, device: str) -> Measure | Unavailable:
    try:
        return OPENERS[name](device)
    except Unavailable as reason:
        return reason


# ---------------------------------------------------------------- pixels


def array(picture: Tensor) -> np.ndarray:
    """(3, H, W) to (H, W, 3), on the CPU."""
    return picture.permute(1, 2, 0).cpu().contiguous().numpy()


def psnr(decoded: Tensor, truth: Tensor) -> float:
    """10 log10(255^2 / mean squared error over all channels), at most HIGHEST_PSNR."""
    error = (decoded.double() - truth.double()).square().mean().item()
    return min(HIGHEST_PSNR, 10 * math.log10(255**2 / error)) if error else HIGHEST_PSNR


def _ssim(device: str) -> Measure:
    """scikit-image's on bytes, its default 7x7 uniform window, mean of the channels: as the paper measures."""
    with needing("scikit-image"):
        from skimage.metrics import structural_similarity

    return lambda a, b: float(structural_similarity(array(a), array(b), channel_axis=2))


def _ms_ssim(device: str) -> Measure:
    """Five scales, 11x11 Gaussian windows (Wang et al. 2003), from torchmetrics; negative terms count as zero."""
    with needing("torchmetrics"):
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as similarity

    return lambda a, b: similarity(a[None].float(), b[None].float(), data_range=255.0, normalize="relu").item()


def _ssimulacra2(device: str) -> Measure:
    """SSIMULACRA2 (Sneyers), 100 for equal pictures, 70 high quality; the package reads files, here from memory."""
    with needing("ssimulacra2"):
        from PIL import Image
        from ssimulacra2 import compute_ssimulacra2

    def file(picture: Tensor) -> io.BytesIO:
        Image.fromarray(array(picture)).save(buffer := io.BytesIO(), "PPM")
        return buffer

    return lambda a, b: float(compute_ssimulacra2(file(b), file(a)))


def tints(decoded: Tensor, truth: Tensor) -> list[float]:
    """Mean of decoded - truth per channel."""
    return (decoded.double() - truth.double()).mean((1, 2)).tolist()


def tint(decoded: Tensor, truth: Tensor) -> float:
    """Mean over the channels of the size of a picture's tint: errors of opposite sign in two pictures do not cancel."""
    return sum(map(abs, tints(decoded, truth))) / 3


# ---------------------------------------------------------------- agreement


def agreement(decoded: Tensor, original: Tensor) -> dict[str, list[float]]:
    """How far the structure of two decoders' pictures of the same latents agrees: what a user sees move, not colour or grain.

    Both uint8 (N, 3, H, W); of each the luma, blurred by a Gaussian (sigma BLUR, mirrored borders), less its mean. One value
    per picture under the names of AGREEMENT: mean absolute difference in 1/255, PSNR in dB (at most HIGHEST_PSNR), correlation
    (NaN where either is flat). For the rest, call the metrics with the original decoder's picture as the truth.
    """
    from scipy.ndimage import gaussian_filter

    check_pair(decoded, original)
    found: dict[str, list[float]] = {name: [] for name in AGREEMENT}
    for pair in zip(decoded, original, strict=True):
        a, b = (gaussian_filter(luma(picture).cpu().numpy(), BLUR, mode="reflect") for picture in pair)
        a, b = a - a.mean(), b - b.mean()
        error, spread = float(np.square(a - b).mean()), float(np.sqrt(np.square(a).mean() * np.square(b).mean()))
        found["agreement_mae"].append(float(np.abs(a - b).mean()))
        found["agreement_psnr"].append(min(HIGHEST_PSNR, 10 * math.log10(255**2 / error)) if error else HIGHEST_PSNR)
        found["agreement_correlation"].append(float((a * b).mean()) / spread if spread > 1e-9 else math.nan)
    return found


# ---------------------------------------------------------------- networks


def _distance(network: nn.Module, device: str, low: float) -> Measure:
    """Of a network that compares pictures (1, 3, H, W) on [low, 1]."""
    network = network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # 1.25x on a CPU

    def scaled(picture: Tensor) -> Tensor:
        x = picture[None].to(device).float() / 255 * (1 - low) + low
        return x.contiguous(memory_format=torch.channels_last)

    return lambda a, b: network(scaled(a), scaled(b)).item()


def _lpips(backbone: str, net: str, device: str) -> Measure:
    """LPIPS 0.1 (Zhang et al. 2018) of the lpips package, which brings the heads; torchvision's trunk is downloaded."""
    with needing("lpips"):
        import lpips
    fetch(torchvision_url(backbone))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision in a way that warns
        return _distance(lpips.LPIPS(net=net, verbose=False), device, low=-1)


def _stlpips(device: str) -> Measure:
    """Shift-tolerant LPIPS (Ghildyal and Liu 2022) on AlexNet; all weights come with its package."""
    with needing("stlpips-pytorch"):
        from stlpips_pytorch import stlpips

    return _distance(stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False), device, low=-1)


def _dists(device: str) -> Measure:
    """DISTS (Ding et al. 2020) of torchmetrics on torchvision's VGG16, at the pictures' own size (its authors resize to 256)."""
    with needing("torchmetrics"):
        from torchmetrics.functional.image.dists import DISTSNetwork
    fetch(torchvision_url("vgg16"))
    return _distance(DISTSNetwork(), device, low=0)


OPENERS: dict[str, Callable[[str], Measure]] = {
    "psnr": lambda device: psnr,
    "ssim": _ssim,
    "ms_ssim": _ms_ssim,
    "lpips_alex": partial(_lpips, "alexnet", "alex"),
    "lpips_vgg": partial(_lpips, "vgg16", "vgg"),
    "lpips_squeeze": partial(_lpips, "squeezenet1_1", "squeeze"),
    "stlpips": _stlpips,
    "ssimulacra2": _ssimulacra2,
    "dists": _dists,
    "tint_r": lambda device: lambda a, b: tints(a, b)[0],
    "tint_g": lambda device: lambda a, b: tints(a, b)[1],
    "tint_b": lambda device: lambda a, b: tints(a, b)[2],
    "tint": lambda device: tint,
    "sharpness": lambda device: sharpness,
    "mesh": lambda device: mesh,
    **{name: lambda device, name=name: lambda a, b: agreement(a[None], b[None])[name][0] for name in AGREEMENT},  # type: ignore[misc]
}
