"""Quality of a decoder on held-out pictures, by the conventions of DESIGN 5."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import DecoderTiny
from latents import StandInEncoder
from losses import ShiftTolerantLPIPS
from safetensors.torch import load_file
from torch import Tensor, nn


class TinyDecoder(nn.Module):
    """TAESD(XL)'s decoder from its own layout, where layer 0 is the parameter-free squash: scaled latents to [-1, 1]."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        stored = load_file(weights)
        state = {}
        for key, value in stored.items():
            index, rest = key.split(".", 1)
            state[f"layers.{int(index) - 1}.{rest}"] = value.float()
        channels = stored["1.weight"].shape[1]
        self.network = DecoderTiny(channels, 3, (3, 3, 3, 1), (64,) * 4, upsampling_scaling_factor=2, act_fn="relu", upsample_fn="nearest")
        self.network.load_state_dict(state)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z)


@torch.no_grad()
def measure(
    decode: nn.Module,
    encoder: StandInEncoder,
    pictures: list[Tensor],
    share: float,
    stlpips: ShiftTolerantLPIPS,
    autocast: bool,
) -> dict[str, float]:
    """Means over the pictures, latents being the encoder's plus `share` of the colour table.

    PSNR in dB on the whole picture, ST-LPIPS on its centre of 256 px, tint in 1/255 (signed, per channel),
    and PSNR on flat real colours.
    """
    psnr, distance, tint = [], [], []
    for picture in pictures:
        x = picture[None].float() / 127.5 - 1
        z = encoder.encode(x) + share * encoder.table_at(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = decode(z.contiguous(memory_format=torch.channels_last)).float()
        y = (y.clamp(-1, 1) + 1) / 2
        x = (x + 1) / 2
        psnr.append(-10 * (y - x).square().mean().log10())
        top, left = ((n - 256) // 2 for n in x.shape[2:])
        crop = (..., slice(top, top + 256), slice(left, left + 256))
        distance.append(stlpips(y[crop] * 2 - 1, x[crop] * 2 - 1))
        tint.append((y - x).mean(dim=(0, 2, 3)) * 255)
    found = {"psnr": torch.stack(psnr).mean().item(), "stlpips": torch.stack(distance).mean().item()}
    found |= {f"tint_{c}": v.item() for c, v in zip("rgb", torch.stack(tint).mean(0), strict=True)}
    if encoder.colours is not None:
        some = slice(None, None, 97)
        colours, flat = encoder.colours["srgb"][some], encoder.colours["latent"][some]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoded = torch.cat([decode(part) for part in flat[:, :, None, None].expand(-1, -1, 32, 32).split(8)]).float()
        centre = (decoded[..., 64:-64, 64:-64].clamp(-1, 1) + 1) / 2
        error = centre - colours[:, :, None, None]
        found["flat_psnr"] = -10 * error.square().mean().log10().item()
        found["flat_worst"] = (error.mean(dim=(2, 3)).abs().max() * 255).item()
    return {key: round(value, 4) for key, value in found.items()}
