"""Encoders: the tiny one of a latent space, the encoding part of a VAE, and a VAE's encode in float32."""

import copy
import json
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.vae import EncoderTiny
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors.torch import load_file
from torch import Tensor, nn

from . import presets
from .latent_space import LatentSpace
from .socket import GUARDED

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


def encoder_part(vae: Any) -> nn.Module:
    """`vae` without its decoder, over the same encoder modules: what encoding needs, and no more memory than that (CONTRACT 5.5).

    A VAE that pipelines would upcast encodes in float32 here too: no pipeline sees its `force_upcast` any more.
    """
    part: Any = copy.copy(vae)
    kept = {name: module for name, module in vae._modules.items() if name not in ("decoder", "post_quant_conv")}
    # What a swapped decoder left on the VAE refers to the whole VAE, and to the original decoder.
    own = {name: value for name, value in vae.__dict__.items() if name not in (*GUARDED, "_swapped")}
    part.__dict__ = {**own, "_modules": kept}
    if getattr(vae.config, "force_upcast", False) or "encode" in vae.__dict__:
        part.encode = partial(encode_in_float32, part)
    return part


@apply_forward_hook
def encode_in_float32(vae: Any, x: Tensor, return_dict: bool = True) -> Any:
    """The VAE's encode with encoder and quant_conv in float32, as pipelines do for `force_upcast`: float16 overflows (CONTRACT 4.4)."""
    parts = [part for part in (vae.encoder, getattr(vae, "quant_conv", None)) if part is not None]
    dtype = next(parts[0].parameters()).dtype
    try:
        for part in parts:
            part.to(torch.float32)
        return type(vae).encode(vae, x.float(), return_dict=return_dict)
    finally:
        for part in parts:
            part.to(dtype)
