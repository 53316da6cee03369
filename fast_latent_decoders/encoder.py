"""Encoders: the tiny one of a latent space, the encoding part of a VAE, a VAE's encode in float32; and what gives a decoder an `encode`."""

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from diffusers.models.autoencoders.vae import EncoderTiny, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
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


class Encoding:
    """What gives a decoder an `encode`, so that pipelines take it for a whole VAE."""

    config: Any
    device: torch.device
    dtype: torch.dtype
    latent_space: LatentSpace
    register_to_config: Callable[..., None]
    # Held in a tuple, outside the module tree: not saved, counted, cast or offloaded with the decoder (CONTRACT 5.3).
    _encoder: tuple[nn.Module] | None = None

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Any]:
        """Pictures (N, 3, H, W) in [-1, 1] to an object with `.latent_dist.sample(generator)` and `.mode()`, in VAE units.

        By the tiny encoder of the same latent space, or by the VAE given to `with_encoder`, which keeps its own dtype.

        Raises:
            RuntimeError: this decoder has no encoder; the message says how to give it one.
            ValueError: x is not (N, 3, H, W).
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected pictures (N, 3, H, W) in [-1, 1], got shape {tuple(x.shape)}")
        if self.device.type != "meta":
            x = x.to(self.device)
        if self.config.encoder == "embedded":
            distribution = self._encode_embedded(x)
        elif self._encoder is not None:
            distribution = self._encode_external(self._encoder[0], x)
        else:
            raise RuntimeError(
                f"this {type(self).__name__} has encoder={self.config.encoder!r} and none was given: pass encoder=vae to "
                "from_pretrained, or call .with_encoder(vae), before image-to-image, inpainting or image-to-video"
            )
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def _encode_embedded(self, x: Tensor) -> IdentityDistribution:
        if self._encoder is None:
            self._encoder = (load_tiny_encoder(self.latent_space),)
            warnings.warn(
                f"encoding with the tiny {self.latent_space.name!r} encoder, a stand-in for the VAE's own; "
                "pass encoder=vae to from_pretrained for the real one",
                stacklevel=3,
            )
        tiny = self._encoder[0].to(device=x.device, dtype=self.dtype)
        space = self.latent_space
        return IdentityDistribution(tiny(x.to(self.dtype)) / space.scaling_factor + space.shift_factor)

    @staticmethod
    def _encode_external(vae: Any, x: Tensor) -> Any:
        # No hook moves the delegate (CONTRACT 5.3): it comes to the input for this call and goes back.
        home = next(vae.parameters())
        if home.device.type == "meta" or home.device == x.device:
            return vae.encode(x.to(home.dtype)).latent_dist
        device = home.device
        try:
            return vae.to(x.device).encode(x.to(home.dtype)).latent_dist
        finally:
            vae.to(device)

    def with_encoder(self, vae: nn.Module) -> Self:
        """Let `vae` (its encoder; the decoder is not held) do the encoding, in its own dtype. Returns self.

        Raises:
            TypeError: `vae` is not a VAE with an encoder.
            ValueError: it has another latent space.
        """
        if not hasattr(vae, "encoder") or not hasattr(vae, "config"):
            raise TypeError(f"expected a diffusers VAE with an encoder (AutoencoderKL, AutoencoderKLTemporalDecoder), got {type(vae).__name__}")
        presets.check_space(vae, self.latent_space)
        self._encoder = (encoder_part(vae),)
        self.register_to_config(encoder="external")
        return self
