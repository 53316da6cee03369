"""Socket B for pipelines: swap a VAE's decoder and put the original back."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.models import UNetSpatioTemporalConditionModel
from PIL.Image import Image
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


def stream_frames(pipe: Any, *args: Any, **kwargs: Any) -> Iterator[list[Image]]:
    """Run a video pipeline and give its frames as they are decoded: ``for (frame,) in stream_frames(pipe, image, num_frames=25)``.

    The clip is seamless whatever its length, and takes the memory of one frame. Decodes by `decode_stream`, one frame after the other,
    where the pipeline's own `decode_chunk_size` cuts the clip into parts that do not know of each other (CONTRACT 3.2).

    Args:
        pipe: StableVideoDiffusionPipeline, or one of AnimateDiff's, whose VAE is a FastDecoder or has one inside (`swap_decoder`).
        *args, **kwargs: the pipeline's own, but for `output_type`.

    Yields:
        A picture of each clip.

    Raises:
        TypeError: the pipeline decodes with something else, or with a decoder that needs the whole clip.
    """
    decoder = pipe.vae if isinstance(pipe.vae, FastDecoder) else pipe.vae.decoder
    if not isinstance(decoder, FastDecoder | DecoderSocket):
        raise TypeError(
            f"this pipeline decodes with {type(decoder).__name__}, which cannot stream; "
            'call swap_decoder(pipe, "subpixel-temporal-svd") first'
        )
    network = decoder.network if isinstance(decoder, DecoderSocket) else decoder.decoder
    if not network.streams:  # said now, not after the denoising
        raise TypeError(f"{type(network).__name__} needs the whole clip at once: call the pipeline itself, with decode_chunk_size=num_frames")
    latents = pipe(*args, output_type="latent", **kwargs).frames
    if not isinstance(pipe.unet, UNetSpatioTemporalConditionModel):
        latents = latents.transpose(1, 2)  # AnimateDiff: (clips, C, frames, h, w)
    if hook := getattr(pipe.vae, "_hf_hook", None):  # model offload would not see a call of the socket (CONTRACT 7.3)
        hook.pre_forward(pipe.vae)
    for sample, _ in decoder.decode_stream(latents / pipe.vae.config.scaling_factor):
        yield pipe.video_processor.postprocess(sample, output_type="pil")
    pipe.maybe_free_model_hooks()


def _replace(vae: nn.Module, decoder: nn.Module) -> None:
    vae.decoder = decoder
    # Group offloading remembers modules by reference (it would keep the old decoder alive and leave the new one out);
    # the hooks of model offload sit on the VAE itself, those of sequential offload came with `inside`.
    _maybe_remove_and_reapply_group_offloading(vae)
