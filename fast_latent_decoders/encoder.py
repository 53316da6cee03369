"""Encoders for socket A: the tiny one of a latent space, or the encoding part of a VAE."""

import copy
import json

from diffusers.models.autoencoders.vae import EncoderTiny
from safetensors.torch import load_file
from torch import nn

from . import presets
from .latent_space import LatentSpace

FOLDERS = {"sdxl": "taesdxl-encoder", "sd": "taesd-encoder"}


def load_tiny_encoder(space: LatentSpace) -> nn.Module:
    """TAESD(XL)'s encoder (MIT, Ollin Boer Bohan): pictures (N, 3, H, W) in [-1, 1] to scaled latents (N, C, H/8, W/8).

    Raises:
        RuntimeError: no tiny encoder exists for this latent space.
    """
    if space.name not in FOLDERS:
        raise RuntimeError(
            f"there is no tiny encoder for the latent space {space.name!r} (there are: {', '.join(FOLDERS)}); pass encoder=vae"
        )
    folder = presets.folder(FOLDERS[space.name])
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    encoder = EncoderTiny(**config)
    encoder.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    return encoder.eval().requires_grad_(False)


def encoder_part(vae: nn.Module) -> nn.Module:
    """`vae` without its decoder, over the same encoder modules: what encoding needs, and no more memory than that (CONTRACT 5.5)."""
    part = copy.copy(vae)
    kept = {name: module for name, module in vae._modules.items() if name not in ("decoder", "post_quant_conv")}
    part.__dict__ = {**vae.__dict__, "_modules": kept}
    return part
