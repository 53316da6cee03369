"""SDXL and SD 1.x pipelines: the three ways to put a decoder in give one picture, in every dtype and task."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionXLImg2ImgPipeline

from fast_latent_decoders import FastDecoder, restore_decoder, swap_decoder
from tests.pipelines import tiny

HALVES = (torch.float16, torch.bfloat16)
TASKS: dict[str, Callable[[Any], Any]] = {
    "text": lambda pipe: pipe,
    "image": tiny.image_to_image,
    "inpainting": tiny.inpainting,
    "controlnet": tiny.controlnet,
}


def three_ways(make: Callable[[], Any], fast: FastDecoder) -> list[np.ndarray]:
    """The pictures of the three lines of the README: the whole VAE, `swap_decoder`, `inside` by hand."""
    whole = make()
    whole.vae = fast.with_encoder(whole.vae)  # so that all three encode alike
    swapped = make()
    swap_decoder(swapped, fast)
    by_hand = make()
    by_hand.vae.decoder = fast.inside(by_hand.vae)
    return [tiny.run(pipe) for pipe in (whole, swapped, by_hand)]


def assert_pictures(pictures: list[np.ndarray], tolerance: float) -> None:
    first, *others = pictures
    assert first.std() > 0.02
    assert ((first > 0.001) & (first < 0.999)).mean() > 0.8  # mostly not saturated: a difference would show
    for other in others:
        np.testing.assert_allclose(other, first, rtol=0, atol=tolerance)


@pytest.mark.parametrize("task", TASKS)
def test_three_ways_give_the_same_picture_in_sdxl(task: str) -> None:
    """With a learned post_quant_conv, that only the second and third way have to undo."""
    assert_pictures(three_ways(lambda: TASKS[task](tiny.sdxl()), tiny.decoder()), 2e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_three_ways_give_the_same_picture_in_sd(family: str) -> None:
    assert_pictures(three_ways(tiny.sd, tiny.decoder(family, space="sd")), 2e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("task", TASKS)
def test_three_ways_in_half_precision(task: str, dtype: torch.dtype) -> None:
    """They agree to the rounding of the latents, which the VAE's post_quant_conv adds in this dtype."""
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    assert_pictures(three_ways(lambda: TASKS[task](tiny.sdxl(dtype)), tiny.decoder().to(dtype)), tolerance)


@pytest.mark.parametrize("latents_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("vae_dtype", [torch.float32, *HALVES])
def test_the_decoder_may_have_another_dtype_than_the_pipeline(latents_dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
    """SDXL does not cast latents to the VAE's dtype (CONTRACT 2.3): `decode` does."""
    pipe = tiny.sdxl(latents_dtype)
    unscaled = tiny.run(pipe, output_type="latent") / 0.13025  # in the pipeline's dtype
    expected = tiny.decoder().decode(unscaled).sample
    pipe.vae = tiny.decoder().to(vae_dtype)
    picture = tiny.run(pipe, output_type="pt")
    assert pipe.vae.dtype == vae_dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[vae_dtype]
    torch.testing.assert_close(picture.float(), (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("latents_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("vae_dtype", [torch.float32, *HALVES])
def test_the_socket_takes_what_follows_post_quant_conv_in_any_dtype(latents_dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
    vae = tiny.kl().to(vae_dtype)
    socket, z = tiny.decoder().inside(vae), tiny.latents()
    expected = tiny.decoder().decode(z).sample
    behind = torch.nn.functional.conv2d(z, tiny.POST_QUANT[:, :, None, None], tiny.POST_QUANT_BIAS).to(latents_dtype)
    sample = socket(behind)
    assert sample.dtype == vae_dtype
    assert (sample.float() - expected).abs().max() < 0.05


@pytest.mark.parametrize("task", ["image", "inpainting"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", ["swapped", "whole"])
def test_a_vae_that_upcasts_still_encodes_in_float32(task: str, dtype: torch.dtype, way: str) -> None:
    """The latents that enter the loop are, bit for bit, those of the stock pipeline's upcast encode."""
    encoded: list[list[torch.Tensor]] = []
    for swap in (False, True):
        pipe = TASKS[task](tiny.sdxl(dtype))
        seen: list[torch.Tensor] = []
        # Keep a trace of what the VAE's quant_conv, the end of its encoder, gives.
        pipe.vae.quant_conv.register_forward_hook(lambda *args, seen=seen: seen.append(args[2].clone()))
        encoder = pipe.vae.encoder
        if swap and way == "swapped":
            swap_decoder(pipe, tiny.decoder())
            assert pipe.vae.config.force_upcast is False
        elif swap:
            pipe.vae = tiny.decoder().to(dtype).with_encoder(pipe.vae)
        picture = tiny.run(pipe)
        assert np.isfinite(picture).all()
        assert pipe.vae.dtype == next(encoder.parameters()).dtype == dtype  # and back again
        encoded.append(seen)
    assert len(encoded[0]) == len(encoded[1]) > 0
    for stock, ours in zip(*encoded, strict=True):
        assert ours.dtype == stock.dtype == torch.float32
        assert torch.equal(ours, stock)


def test_an_encoder_that_float16_overflows_stays_finite_after_a_swap() -> None:
    """As SDXL's VAE does: its activations pass 65504. Without the float32 encode this picture is NaN."""
    pipe = tiny.image_to_image(tiny.sdxl(torch.float16))
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(3e4)  # 27 of them make 729,000
    x = torch.full((1, 3, 64, 64), 0.9, dtype=torch.float16)
    assert not pipe.vae.encode(x).latent_dist.mode().isfinite().all()
    swap_decoder(pipe, tiny.decoder())
    assert pipe.vae.encode(x).latent_dist.mode().isfinite().all()
    restore_decoder(pipe, original=tiny.kl())
    assert "encode" not in vars(pipe.vae)


def test_a_vae_that_does_not_upcast_encodes_in_its_own_dtype() -> None:
    pipe = tiny.sd(torch.float16)
    swap_decoder(pipe, tiny.decoder(space="sd"))
    assert pipe.vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.float16)).latent_dist.mode().dtype == torch.float16


# ---------------------------------------------------------------- other pipelines made of this one


def test_from_pipe_with_the_vae_named() -> None:
    """`from_pipe` alone drops a VAE of another class (CONTRACT 6.7); `vae=p.vae` is the documented form."""
    pipe = tiny.sdxl()
    pipe.vae = tiny.decoder(encoder="embedded")
    image = tiny._quiet(StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae))
    assert image.vae is pipe.vae
    with pytest.warns(UserWarning, match="stand-in"):
        pictures = [tiny.run(image), tiny.run(tiny.image_to_image(pipe))]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.filterwarnings("ignore:encoding with the tiny")
@pytest.mark.parametrize("swap", [False, True])
def test_auto_pipeline_keeps_the_decoder(swap: bool) -> None:
    pipe = tiny.sdxl()
    if swap:
        swap_decoder(pipe, tiny.decoder())
    else:
        pipe.vae = tiny.decoder(encoder="embedded")
    image = tiny._quiet(AutoPipelineForImage2Image.from_pipe(pipe))
    assert image.vae is pipe.vae
    assert isinstance(image, StableDiffusionXLImg2ImgPipeline)
    assert np.isfinite(tiny.run(image)).all()


def test_from_pipe_shares_a_swapped_vae() -> None:
    pipe = tiny.sdxl()
    swap_decoder(pipe, tiny.decoder())
    assert StableDiffusionXLImg2ImgPipeline.from_pipe(pipe).vae is pipe.vae


@pytest.mark.parametrize("swap", [False, True])
def test_modular_diffusers_decode_step(swap: bool) -> None:
    """CONTRACT 8.1."""
    from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep

    fast, latents = tiny.decoder(), tiny.latents() * 0.13025
    blocks = StableDiffusionXLDecodeStep().init_pipeline()
    if swap:
        pipe = tiny.sdxl()
        swap_decoder(pipe, fast)
        blocks.update_components(vae=pipe.vae)
    else:
        blocks.update_components(vae=fast)
    images = blocks(latents=latents, output="images", output_type="pt")
    expected = (fast.decode(tiny.latents()).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
