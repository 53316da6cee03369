"""Socket B for pipelines: swap a VAE's decoder and put the original back."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import nn

from .decoder import FastDecoder
from .encoder import encode_in_float32
from .socket import DecoderSocket, follow, unplug


@dataclass
class _Swapped:
    """What a swap changed, kept on the VAE outside its module tree."""

    original: nn.Module | None
    force_upcast: bool


def swap_decoder(pipe: Any, decoder: str | os.PathLike[str] | FastDecoder, *, keep: bool = False) -> None:
    """Replace the decoder of `pipe.vae`, which keeps its encoder: ``swap_decoder(pipe, "subpixel-sdxl")``.

    Works before and after offloading is enabled. The VAE no longer upcasts to decode; where it was configured to
    (`force_upcast`), its encoder goes on working in float32. `pipe.vae.enable_tiling()` gives exact tiles.
    Swapping again replaces the swapped decoder; an original that was kept stays kept.

    Args:
        pipe: a diffusers pipeline whose `vae` is an AutoencoderKL or AutoencoderKLTemporalDecoder.
        decoder: a FastDecoder, or what `FastDecoder.from_pretrained` takes.
        keep: hold the original decoder in main memory for `restore_decoder`; otherwise it is freed.

    Raises:
        TypeError, ValueError: as `FastDecoder.inside`.
    """
    vae = pipe.vae
    if not isinstance(decoder, FastDecoder):
        decoder = FastDecoder.from_pretrained(decoder)
    socket = decoder.inside(vae)
    swapped: _Swapped | None = getattr(vae, "_swapped", None)
    if swapped is None:
        original = vae.decoder if keep and not isinstance(vae.decoder, DecoderSocket) else None
        swapped = _Swapped(original, bool(getattr(vae.config, "force_upcast", False)))
    vae._swapped = swapped
    if swapped.original is not None and next(swapped.original.parameters()).device.type not in ("cpu", "meta"):
        swapped.original.to("cpu")
    socket.use_tiling = bool(getattr(vae, "use_tiling", False))
    _replace(vae, socket)
    if swapped.force_upcast:
        # Decoding needs no float32 any more, encoding still does (CONTRACT 4.4). Assigning to config would not be saved (2.7).
        vae.register_to_config(force_upcast=False)
        vae.encode = partial(encode_in_float32, vae)


def restore_decoder(pipe: Any, original: nn.Module | None = None) -> None:
    """Put back the decoder that `swap_decoder(..., keep=True)` kept, bit for bit, or the decoder of the VAE `original`.

    Raises:
        ValueError: nothing was swapped, or the original was not kept and none is given.
    """
    vae = pipe.vae
    swapped: _Swapped | None = getattr(vae, "_swapped", None)
    if swapped is None and not isinstance(getattr(vae, "decoder", None), DecoderSocket):
        raise ValueError(f"the decoder of this pipeline's {type(vae).__name__} was not swapped: there is nothing to restore")
    kept = swapped.original if swapped is not None else None
    decoder: nn.Module | None = getattr(original, "decoder", original) if original is not None else kept
    if decoder is None:
        raise ValueError("the original decoder was not kept: call swap_decoder(..., keep=True), or restore_decoder(pipe, original=vae)")
    if next(decoder.parameters()).device.type != "meta":  # else it was taken out under sequential offload, and has its hooks
        follow(decoder, vae)
    _replace(vae, decoder)
    unplug(vae)
    if swapped is not None:
        if swapped.force_upcast:
            vae.register_to_config(force_upcast=True)
        del vae._swapped


def _replace(vae: nn.Module, decoder: nn.Module) -> None:
    vae.decoder = decoder
    # Group offloading remembers modules by reference (it would keep the old decoder alive and leave the new one out);
    # the hooks of model offload sit on the VAE itself, those of sequential offload came with `inside`.
    _maybe_remove_and_reapply_group_offloading(vae)
