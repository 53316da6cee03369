"""Stable Video Diffusion: both sockets, chunks of frames, two clips, its encode, tiles its own VAE does not have."""

from typing import Any

import numpy as np
import pytest
import torch

from fast_latent_decoders import FastDecoder, restore_decoder, swap_decoder
from tests.pipelines import tiny

FAMILIES = ("subpixel", "temporal", "streaming")


def put_in(pipe: Any, way: str, fast: FastDecoder) -> Any:
    """`pipe` with its decoder replaced: as a whole VAE, by swap_decoder, or by hand."""
    if way == "whole":
        pipe.vae = fast.with_encoder(pipe.vae)
    elif way == "swapped":
        swap_decoder(pipe, fast)
    else:
        pipe.vae.decoder = fast.inside(pipe.vae)
    return pipe


WAYS = ("whole", "swapped", "by hand")


@pytest.mark.parametrize("family", FAMILIES)
def test_three_ways_give_the_same_clip(family: str) -> None:
    clips = [tiny.run(put_in(tiny.svd(), way, tiny.decoder(family, "sd"))) for way in WAYS]
    assert clips[0].shape == (1, 4, 64, 64, 3)
    assert clips[0].std() > 0.02
    for clip in clips[1:]:
        np.testing.assert_allclose(clip, clips[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    clips = [tiny.run(put_in(tiny.svd(dtype), way, tiny.decoder("subpixel", "sd").to(dtype)), steps=1, num_frames=2) for way in WAYS]
    assert np.isfinite(clips[0]).all()
    for clip in clips[1:]:
        np.testing.assert_allclose(clip, clips[0], rtol=0, atol=2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 3, None], ids=["1", "3, then the rest", "all"])
@pytest.mark.parametrize("clips", [1, 2])
def test_decode_chunks(way: str, family: str, chunk: int | None, clips: int) -> None:
    """Chunks of 1, of 3 with a shorter last one, and whole clips; with two clips a chunk of 3 straddles both (CONTRACT 3.2).

    Each chunk reaches the network with its own length as `num_frames`. Families without time do not care.
    """
    pipe = put_in(_svd(), way, tiny.decoder(family, "sd"))
    network = pipe.vae.decoder if way == "whole" else pipe.vae.decoder.network
    calls: list[tuple[int, int]] = []
    network.register_forward_pre_hook(lambda _, inputs: calls.append((len(inputs[0]), inputs[1])))
    frames, z = 4, tiny.latents("sd", n=4 * clips)
    step = chunk or frames
    with torch.no_grad():
        clip = pipe.decode_latents(z.unflatten(0, (clips, frames)) * 0.18215, frames, step)
    lengths = [min(step, frames * clips - start) for start in range(0, frames * clips, step)]
    assert calls == [(length, length) for length in lengths]

    fast = tiny.decoder(family, "sd")
    expected = torch.cat([fast.decode(part, num_frames=len(part)).sample for part in z.split(step)])
    torch.testing.assert_close(clip, expected.unflatten(0, (clips, frames)).transpose(1, 2), rtol=0, atol=2e-5)
    if family == "subpixel":
        whole = fast.decode(z).sample.unflatten(0, (clips, frames)).transpose(1, 2)
        torch.testing.assert_close(clip, whole, rtol=0, atol=2e-5)


def _svd() -> Any:
    if not _CACHE:
        _CACHE.append(tiny.svd())
    pipe = _CACHE[0]
    pipe.vae = tiny.temporal_kl()
    return pipe


_CACHE: list[Any] = []


def test_two_clips_in_one_call() -> None:
    """`num_videos_per_prompt=2` in chunks of 3 of 8 frames gives the clips of an unchunked decode."""
    fast = tiny.decoder("subpixel", "sd")
    clips = [tiny.run(put_in(tiny.svd(), "swapped", fast), num_videos_per_prompt=2, decode_chunk_size=size) for size in (3, 8)]
    assert clips[0].shape == (2, 4, 64, 64, 3)
    np.testing.assert_allclose(clips[0], clips[1], rtol=0, atol=2e-5)


def test_the_swapped_vae_encodes_in_float32() -> None:
    """As the stock pipeline's upcast encode, but for the picture, which the pipeline then rounds to float16 first."""
    encoded: list[torch.Tensor] = []
    for swap in (False, True):
        pipe = tiny.svd(torch.float16)
        if swap:
            swap_decoder(pipe, tiny.decoder("subpixel", "sd"))
        pipe.vae.quant_conv.register_forward_hook(lambda *args: encoded.append(args[2].clone()))
        tiny.run(pipe, steps=1, num_frames=2, output_type="latent")
        assert pipe.vae.dtype == torch.float16
    stock, ours = encoded
    assert ours.dtype == stock.dtype == torch.float32
    torch.testing.assert_close(ours, stock, rtol=0, atol=5e-3)


def test_tiling_of_a_vae_that_has_none() -> None:
    """Stock, `enable_tiling` raises here. Swapped, the tiles are the socket's; restored, it raises again."""
    pipe = tiny.svd()
    with pytest.raises(NotImplementedError):
        pipe.vae.enable_tiling()
    swap_decoder(pipe, tiny.decoder("subpixel", "sd"), keep=True)
    z = tiny.latents("sd", n=3, height=11, width=9)
    with torch.no_grad():
        whole = pipe.vae.decode(z, num_frames=3).sample
        pipe.vae.enable_tiling()
        pipe.vae.decoder.tile_size = 4
        shapes: list[Any] = []
        pipe.vae.decoder.network.layers[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        torch.testing.assert_close(pipe.vae.decode(z, num_frames=3).sample, whole, rtol=0, atol=1e-6)
        assert len(shapes) == 11  # strips of one row of nine latents
        pipe.vae.disable_tiling()
        assert torch.equal(pipe.vae.decode(z, num_frames=3).sample, whole)
    restore_decoder(pipe)
    with pytest.raises(NotImplementedError):
        pipe.vae.enable_tiling()


def test_embedded_encoder_serves_image_to_video() -> None:
    """Socket A without any VAE: SVD takes `encode(x).latent_dist.mode()`, unscaled (CONTRACT 1.4b)."""
    pipe = tiny.svd()
    pipe.vae = tiny.decoder("subpixel", "sd", encoder="embedded")
    with pytest.warns(UserWarning, match="tiny 'sd' encoder"):
        assert np.isfinite(tiny.run(pipe)).all()


def test_no_encoder_says_how_to_get_one() -> None:
    pipe = tiny.svd()
    pipe.vae = tiny.decoder("subpixel", "sd")
    with pytest.raises(RuntimeError, match=r"encoder='none'.*pass encoder=vae.*image-to-video"):
        tiny.run(pipe)
