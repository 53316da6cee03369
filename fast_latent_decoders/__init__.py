"""Fast decoders for the latents of SDXL, Stable Diffusion and Stable Video Diffusion."""

# Not a name of ours: diffusers loads a component of a saved pipeline only if the component's library has this base class in it.
from diffusers import ModelMixin as ModelMixin

from .decoder import FastDecoder
from .families import EfficientViTDecoder, SubpixelDecoder, SubpixelTemporalDecoder, TAEDecoder, TAETemporalDecoder
from .latent_space import SD, SDXL, LatentSpace
from .pipelines import restore_decoder, stream_frames, swap_decoder
from .presets import presets

__all__ = [
    "SD",
    "SDXL",
    "EfficientViTDecoder",
    "FastDecoder",
    "LatentSpace",
    "SubpixelDecoder",
    "SubpixelTemporalDecoder",
    "TAEDecoder",
    "TAETemporalDecoder",
    "presets",
    "restore_decoder",
    "stream_frames",
    "swap_decoder",
]
