"""Luma, how much of it is fine detail, and whether that repeats with the latents."""

import math

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # Rec. 601, of the gamma-encoded bytes
NYQUIST_SHARE = 0.75  # sharpness looks at radial frequencies from here on, of the Nyquist frequency
LEAST_DETAIL = 0.1  # grey levels squared: about three times what rounding to bytes leaves in luma, 0.447 / 12


def luma(picture: Tensor) -> Tensor:
    """(3, H, W) bytes to (H, W) float64, 0..255."""
    return torch.einsum("chw,c->hw", picture.double(), torch.tensor(LUMA, dtype=torch.float64, device=picture.device))


def detail(picture: Tensor) -> float:
    """Mean power per frequency of luma at radial frequencies of NYQUIST_SHARE and above, in grey levels squared.

    White noise of variance v gives v, at any size. A Hann window keeps the jump from one border to the other out of it.
    """
    y = luma(picture)
    height, width = y.shape
    window = torch.outer(*(torch.hann_window(n, periodic=False, dtype=y.dtype, device=y.device) for n in (height, width)))
    mean = (y * window).sum() / window.sum()
    power = torch.fft.fft2((y - mean) * window).abs().square() / window.square().sum()
    fy, fx = (torch.fft.fftfreq(n, 0.5, dtype=y.dtype, device=y.device) for n in (height, width))  # 1 at Nyquist
    return power[torch.hypot(fy[:, None], fx) >= NYQUIST_SHARE].mean().item()


def sharpness(decoded: Tensor, truth: Tensor) -> float:
    """Power near Nyquist, decoded over truth: 1 is right, less is blurred, more is noise or invented texture.

    NaN where the truth has none (LEAST_DETAIL): a flat or upscaled picture's ratio would compare rounding noise.
    """
    wanted = detail(truth)
    return detail(decoded) / wanted if wanted >= LEAST_DETAIL else math.nan


def mesh(decoded: Tensor, truth: Tensor) -> float:
    """Rms of the pattern that the error of luma repeats with every latent (8 px), in grey levels.

    What pixel shuffles leave where a loss asks for detail at any place: dots or a grid, which sharpness takes for detail. Errors that
    are not tied to the latents average out: at 256 px the floor is a thirty-second of their rms.
    """
    error = luma(decoded) - luma(truth)
    height, width = (side // 8 * 8 for side in error.shape)
    phases = error[:height, :width].unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).mean((0, 2))
    return phases.std(unbiased=False).item()
