"""Fast decoders for the latents of SDXL, Stable Diffusion and Stable Video Diffusion."""

from .decoder import FastDecoder
from .families import EfficientViTDecoder, SubpixelDecoder, TAEDecoder, TAETemporalDecoder
from .latent_space import SD, SDXL, LatentSpace
from .pipelines import restore_decoder, swap_decoder
from .presets import presets

__all__ = [
    "SD",
    "SDXL",
    "EfficientViTDecoder",
    "FastDecoder",
    "LatentSpace",
    "SubpixelDecoder",
    "TAEDecoder",
    "TAETemporalDecoder",
    "presets",
    "restore_decoder",
    "swap_decoder",
]
