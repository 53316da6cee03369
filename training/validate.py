"""Quality of a decoder on held-out pictures, by the conventions of DESIGN 5."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from latents import StandInEncoder
from losses import ShiftTolerantLPIPS
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

Decode = Callable[[Tensor], Tensor]  # scaled latents (N, C, h, w) to pictures (N, 3, 8h, 8w) in [-1, 1]


def latents_of(encoder: StandInEncoder, pictures: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each picture (1, 3, H, W) in [-1, 1] with the encoder's latents of it and what all of the colour table would add to them."""
    for picture in pictures:
        x = picture[None].float() / 127.5 - 1
        yield x, encoder.encode(x), encoder.table_at(x)


def to_bytes(y: Tensor) -> Tensor:
    """[-1, 1] to correctly rounded 0..255."""
    return (y.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def measure_picture(y: Tensor, x: Tensor, stlpips: ShiftTolerantLPIPS, thorough: bool = True) -> dict[str, float]:
    """One decoded picture (1, 3, H, W) against the truth, both rounded to bytes: what a saved picture has.

    PSNR in dB; signed tint per channel and its size in 1/255; ST-LPIPS; and if `thorough` SSIM and SSIMULACRA2, which are slow.
    """
    device = next(stlpips.parameters()).device
    a, b = to_bytes(y), to_bytes(x)
    error = a.float() - b.float()
    tint = error.mean(dim=(0, 2, 3))
    found = {
        "psnr": (20 * torch.log10(255 / error.square().mean().sqrt().clamp_min(1e-3))).item(),
        "stlpips": stlpips(*(t.to(device).float() / 127.5 - 1 for t in (a, b))).item(),
        **{f"tint_{c}": value for c, value in zip("rgb", tint.tolist(), strict=True)},
        "tint_size": tint.abs().mean().item(),
    }
    if thorough:
        mine, true = (t[0].permute(1, 2, 0).numpy() for t in (a, b))
        found["ssim"] = structural_similarity(mine, true, channel_axis=2)
        found["ssimulacra2"] = ssimulacra2(mine, true)
    return found


def ssimulacra2(picture: np.ndarray, truth: np.ndarray) -> float:
    """SSIMULACRA2 of two (H, W, 3) uint8 pictures; the package reads files."""
    from ssimulacra2 import compute_ssimulacra2

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("truth.png", "picture.png")]
        for path, pixels in zip(paths, (truth, picture), strict=True):
            Image.fromarray(pixels).save(path, compress_level=0)
        return float(compute_ssimulacra2(*paths))


def flat_colours(decode: Decode, encoder: StandInEncoder, every: int = 1) -> dict[str, float]:
    """Real latents of flat colours, 32x32 each, the centre 128 px: PSNR of the pooled error in dB, the worst colour in 1/255."""
    if encoder.colours is None:
        return {}
    colours, flat = (encoder.colours[key][::every] for key in ("srgb", "latent"))
    decoded = torch.cat([decode(part)[..., 64:-64, 64:-64].float() for part in flat[:, :, None, None].expand(-1, -1, 32, 32).split(8)])
    error = (decoded.clamp(-1, 1) + 1) / 2 - colours[:, :, None, None]
    worst = error.mean(dim=(2, 3)).abs().amax(1) * 255
    return {
        "flat_psnr": -10 * error.square().mean().log10().item(),
        "flat_p95": worst.quantile(0.95).item(),
        "flat_worst": worst.max().item(),
    }


@torch.no_grad()
def measure(decode: Decode, encoder: StandInEncoder, pictures: list[Tensor], share: float, stlpips: ShiftTolerantLPIPS) -> dict[str, float]:
    """Quick means for the log of a training run."""
    rows = [measure_picture(decode(z + share * table), x, stlpips, thorough=False) for x, z, table in latents_of(encoder, pictures)]
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return {key: round(value, 4) for key, value in {**means, **flat_colours(decode, encoder, every=97)}.items()}
