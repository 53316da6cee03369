"""Quality of a decoder on held-out pictures, by the conventions of DESIGN 5."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from faces import FaceDetector
from losses import ShiftTolerantLPIPS, temporal
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

from fast_latent_decoders.evaluation import colour
from fast_latent_decoders.evaluation.encoders import FrozenEncoder
from fast_latent_decoders.evaluation.luma import mesh, sharpness
from fast_latent_decoders.evaluation.reading import Sample
from fast_latent_decoders.evaluation.run import to_bytes
from fast_latent_decoders.sheet import Compared, draw_sheet

Decode = Callable[[Tensor, int], Tensor]  # scaled latents (N, C, h, w) and frames of a clip to pictures (N, 3, 8h, 8w) in [-1, 1]
MEASURED_COLOURS = 97  # each so many-th of the real flat colours


def latents_of(encoder: FrozenEncoder, samples: list[Sample]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each picture or clip (T, 3, H, W) in [-1, 1], cut to whole latents, with the encoder's latents and what all of the colour table would add."""
    for sample in samples:
        height, width = (n // 8 * 8 for n in sample.frames.shape[2:])
        x = sample.frames[..., :height, :width].float() / 127.5 - 1
        # Frame by frame: at full resolution a clip's activations are gigabytes.
        yield x, torch.cat([encoder.encode(frame) for frame in x.split(1)]), encoder.table_at(x)


def measure_picture(y: Tensor, x: Tensor, stlpips: ShiftTolerantLPIPS) -> dict[str, float]:
    """A decoded picture or clip (T, 3, H, W) against the truth, both rounded to bytes: what a saved picture has; means over frames.

    PSNR in dB; signed tint per channel, its size and the mesh in 1/255; ST-LPIPS; SSIM; power near Nyquist over the truth's, of those frames
    whose truth has some. `fld evaluate` has more, and intervals.
    """
    device = next(stlpips.parameters()).device
    a, b = to_bytes(y), to_bytes(x)
    error = a.float() - b.float()
    tint = error.mean(dim=(0, 2, 3))
    with torch.no_grad():
        distances = [stlpips(*(t[i : i + 1].to(device).float() / 127.5 - 1 for t in (a, b))).item() for i in range(len(a))]
    pairs = [tuple(t[i].permute(1, 2, 0).numpy() for t in (a, b)) for i in range(len(a))]
    found = {
        "psnr": (20 * torch.log10(255 / error.square().mean(dim=(1, 2, 3)).sqrt().clamp_min(1e-3))).mean().item(),
        "ssim": float(np.mean([structural_similarity(mine, true, channel_axis=2) for mine, true in pairs])),
        "stlpips": float(np.mean(distances)),
        **{f"tint_{c}": value for c, value in zip("rgb", tint.tolist(), strict=True)},
        "tint_size": tint.abs().mean().item(),
        "mesh": float(np.mean([mesh(mine, true) for mine, true in zip(a, b, strict=True)])),
    }
    if ratios := [ratio for mine, true in zip(a, b, strict=True) if math.isfinite(ratio := sharpness(mine, true))]:
        found["sharpness"] = float(np.mean(ratios))
    if len(a) > 1:
        found["temporal"] = temporal(a.float(), b.float(), len(a)).item()  # L_TAE in 1/255
    return found


def flat_colours(decode: Decode, encoder: FrozenEncoder) -> dict[str, float]:
    """Figures of real latents of flat colours (see colour.flat_colours) by the names of the log; none where there are no such latents."""
    if encoder.colours is None:
        return {}
    found = colour.flat_colours(decode, encoder, MEASURED_COLOURS)
    return {"flat_psnr": found.psnr, "flat_p95": found.p95, "flat_worst": found.worst}


@torch.no_grad()
def measure(
    decode: Decode,
    encoder: FrozenEncoder,
    samples: list[Sample],
    share: float,
    stlpips: ShiftTolerantLPIPS,
    detector: FaceDetector | None = None,
) -> dict[str, float]:
    """Quick means for the log of a training run; with a detector also the PSNR within faces, over the pictures that have some."""
    rows = []
    for sample, (x, z, table) in zip(samples, latents_of(encoder, samples), strict=True):
        y = decode(z + share * table, len(x))
        rows.append(measure_picture(y, x, stlpips))
        if detector and (mask := detector.mask(to_bytes(x), sample.boxes)).any():
            error = (to_bytes(y).float() - to_bytes(x).float()).square().mean(1, keepdim=True)[mask].mean()
            rows[-1]["psnr_faces"] = (10 * torch.log10(255**2 / error.clamp_min(1e-6))).item()
    columns = {key: [row[key] for row in rows if key in row] for key in {key: None for row in rows for key in row}}
    # One picture of little detail can have any ratio: the median.
    means = {key: float((np.median if key == "sharpness" else np.mean)(column)) for key, column in columns.items()}
    return {key: round(value, 4) for key, value in {**means, **flat_colours(decode, encoder)}.items()}


@torch.no_grad()
def draw(decoders: dict[str, Decode], encoder: FrozenEncoder, samples: list[Sample]) -> Image.Image:
    """The first frame of each sample and what each decoder makes of it, at half the colour table."""

    def picture(y: Tensor) -> np.ndarray:
        return to_bytes(y[0]).permute(1, 2, 0).numpy()

    rows = []
    for sample, (x, z, table) in zip(samples, latents_of(encoder, samples), strict=True):
        decoded = {name: picture(decode(z + 0.5 * table, len(x))) for name, decode in decoders.items()}
        rows.append(Compared(sample.key.split("/")[-1], picture(x), decoded))
    return draw_sheet(list(decoders), rows)
