"""Socket B: what a swap shares, frees, keeps and gives back, and what it refuses."""

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from fast_latent_decoders import SubpixelDecoder, restore_decoder, swap_decoder
from fast_latent_decoders.socket import DecoderSocket
from tests.pipelines import tiny

PIPELINES = {"sdxl": (tiny.sdxl, "sdxl"), "sd": (tiny.sd, "sd"), "svd": (tiny.svd, "sd")}


class Pipe:
    """As much of a pipeline as a swap needs."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae: Any = vae


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_shared_where_dtype_and_device_agree(family: str) -> None:
    fast, pipe = tiny.decoder(family), Pipe(tiny.kl())
    swap_decoder(pipe, fast)
    theirs = dict(pipe.vae.decoder.network.named_parameters())
    for name, parameter in fast.decoder.named_parameters():
        assert theirs[name].data_ptr() == parameter.data_ptr()
        assert theirs[name] is not parameter


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_moving_the_pipeline_never_changes_the_decoder_that_was_swapped_in(family: str) -> None:
    fast, pipe = tiny.decoder(family), Pipe(tiny.kl())
    before, flags = tensors(fast), [parameter.requires_grad for parameter in fast.parameters()]
    swap_decoder(pipe, fast)
    pipe.vae.to(torch.float16).to(memory_format=torch.contiguous_format).requires_grad_(True).train()
    assert pipe.vae.decoder(tiny.latents()).dtype == torch.float16
    assert fast.dtype == torch.float32
    assert not fast.training
    assert [parameter.requires_grad for parameter in fast.parameters()] == flags
    assert_same(before, tensors(fast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_socket_takes_the_vae_s_dtype_and_keeps_its_affine_in_float32(dtype: torch.dtype) -> None:
    vae = tiny.kl(dtype=dtype)
    socket = tiny.decoder().inside(vae)
    for module in (socket, socket.to(torch.float16), socket.to(torch.float32), socket.half(), copy.deepcopy(socket)):
        assert module.matrix.dtype == module.offset.dtype == torch.float32
    inverse = socket.matrix.double() / 0.13025
    kernel = vae.post_quant_conv.weight.detach()[:, :, 0, 0].double()
    torch.testing.assert_close(inverse @ kernel, torch.eye(4).double(), rtol=0, atol=1e-6)
    assert not list(socket.state_dict()) or all(name.startswith("network.") for name in socket.state_dict())


def test_a_swap_in_a_pipeline_moved_afterwards_is_as_one_moved_before() -> None:
    """But for the rounding of post_quant_conv's weights, which only the latter can undo."""
    pictures = []
    for first in (True, False):
        pipe = tiny.sdxl(torch.float16 if first else torch.float32)
        swap_decoder(pipe, tiny.decoder())
        pictures.append(tiny.run(pipe.to(torch.float16)))
    np.testing.assert_allclose(*pictures, rtol=0, atol=4e-3)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_old_decoder_is_freed_unless_kept(name: str, keep: bool) -> None:
    make, space = PIPELINES[name]
    pipe = make()
    old = weakref.ref(pipe.vae.decoder)
    swap_decoder(pipe, tiny.decoder(space=space), keep=keep)
    gc.collect()
    assert (old() is not None) == keep
    assert all(not isinstance(module, type(old())) for module in pipe.vae.modules()) or not keep


# ---------------------------------------------------------------- and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PIPELINES)
def test_restore_gives_the_original_bits(name: str, dtype: torch.dtype) -> None:
    make, space = PIPELINES[name]
    pipe = make(dtype)
    vae, config, before = pipe.vae, dict(pipe.vae.config), tensors(pipe.vae)
    own = set(vars(vae))
    swap_decoder(pipe, tiny.decoder(space=space), keep=True)
    assert isinstance(vae.decoder, DecoderSocket)
    restore_decoder(pipe)
    assert pipe.vae is vae
    assert dict(vae.config) == config
    assert_same(tensors(vae), before)
    assert set(vars(vae)) == own  # no guard, no mark left


def test_restore_follows_a_pipeline_that_was_moved_in_between() -> None:
    pipe = tiny.sdxl()
    swap_decoder(pipe, tiny.decoder(), keep=True)
    pipe.to(torch.float16)
    restore_decoder(pipe)
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}
    assert np.isfinite(tiny.run(pipe)).all()


def test_restore_from_another_vae() -> None:
    pipe = tiny.sdxl()
    expected = tiny.run(pipe)
    swap_decoder(pipe, tiny.decoder())
    assert np.abs(tiny.run(pipe) - expected).max() > 0.05
    restore_decoder(pipe, original=tiny.kl())
    np.testing.assert_array_equal(tiny.run(pipe), expected)
    assert pipe.vae.config.force_upcast is True


def test_restore_without_keep_says_what_to_do() -> None:
    pipe = Pipe(tiny.kl())
    swap_decoder(pipe, tiny.decoder())
    with pytest.raises(ValueError, match=r"call swap_decoder\(..., keep=True\), or restore_decoder\(pipe, original=vae\)"):
        restore_decoder(pipe)
    assert isinstance(pipe.vae.decoder, DecoderSocket)  # nothing half done
    assert pipe.vae.config.force_upcast is False


def test_restore_of_what_was_not_swapped_is_refused() -> None:
    for vae in (tiny.kl(), tiny.decoder()):
        with pytest.raises(ValueError, match="not swapped: there is nothing to restore"):
            restore_decoder(Pipe(vae))


def test_swapping_twice_keeps_the_first_original() -> None:
    pipe = tiny.sdxl()
    expected = tiny.run(pipe)
    swap_decoder(pipe, tiny.decoder(), keep=True)
    first = weakref.ref(pipe.vae.decoder)
    swap_decoder(pipe, tiny.decoder("tae"))
    gc.collect()
    assert first() is None
    second = Pipe(tiny.kl())
    swap_decoder(second, tiny.decoder("tae"))
    assert torch.equal(pipe.vae.decode(tiny.latents()).sample, second.vae.decode(tiny.latents()).sample)
    restore_decoder(pipe)
    np.testing.assert_array_equal(tiny.run(pipe), expected)
    assert pipe.vae.config.force_upcast is True


def test_a_socket_put_in_by_hand_is_never_taken_for_the_original() -> None:
    pipe = Pipe(tiny.kl())
    pipe.vae.decoder = tiny.decoder().inside(pipe.vae)
    swap_decoder(pipe, tiny.decoder(), keep=True)
    with pytest.raises(ValueError, match="was not kept"):
        restore_decoder(pipe)
    restore_decoder(pipe, original=tiny.kl())
    assert not isinstance(pipe.vae.decoder, DecoderSocket)


def test_by_hand_and_back_by_hand_leaves_a_working_vae() -> None:
    """The guards ask whether a socket is in place: before it is assigned and after it is taken out they do nothing."""
    vae, z = tiny.kl(sample_size=32).requires_grad_(False), tiny.latents(height=9, width=9)
    original, expected = vae.decoder, vae.decode(z).sample
    vae.enable_tiling()
    tiled = vae.decode(z).sample
    socket = tiny.decoder().inside(vae)
    assert torch.equal(vae.decode(z).sample, tiled)
    vae.decoder = socket
    vae.decoder = original
    assert torch.equal(vae.decode(z).sample, tiled)
    vae.disable_tiling()
    assert torch.equal(vae.decode(z).sample, expected)


# ---------------------------------------------------------------- tiling, copies


def test_tiling_enabled_before_the_swap_is_exact_after_it() -> None:
    fast, z = tiny.decoder(), tiny.latents(n=2, height=11, width=9)
    pipe = Pipe(tiny.kl(sample_size=32))  # the VAE's own tiles: 4 latents
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    swap_decoder(pipe, fast, keep=True)
    pipe.vae.decoder.tile_size = 4
    calls: list[int] = []
    pipe.vae.decoder.network.layers[0].register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    torch.testing.assert_close(pipe.vae.decode(z).sample, fast.decode(z).sample, rtol=0, atol=2e-5)
    assert calls == [1] * 22  # 11 strips of each of two pictures
    restore_decoder(pipe)
    assert pipe.vae.use_tiling and pipe.vae.use_slicing


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))], ids=["deepcopy", "pickle"])
def test_a_copied_vae_is_swapped_and_guarded_by_itself(copier: Any, tmp_path: Any) -> None:
    pipe = Pipe(tiny.kl())
    swap_decoder(pipe, tiny.decoder(), keep=True)
    copied = Pipe(copier(pipe.vae))
    assert torch.equal(copied.vae.decode(tiny.latents()).sample, pipe.vae.decode(tiny.latents()).sample)
    with pytest.raises(RuntimeError, match="cannot hold"):
        copied.vae.save_pretrained(tmp_path)
    copied.vae.enable_tiling()
    assert copied.vae.decoder.use_tiling and not pipe.vae.decoder.use_tiling
    restore_decoder(copied)
    assert isinstance(pipe.vae.decoder, DecoderSocket)


def test_layerwise_casting_of_a_swapped_vae() -> None:
    """Weights stored in float8 compute in the wider type (CONTRACT 7.8)."""
    pipe, z = Pipe(tiny.kl("sd")), tiny.latents("sd")
    fast = tiny.decoder(space="sd")
    swap_decoder(pipe, fast)
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    sample = pipe.vae.decode(z).sample
    assert sample.dtype == torch.float32
    assert 0 < (sample - fast.decode(z).sample).square().mean().sqrt() < 0.1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("vae", "sentence"),
    [
        (lambda: tiny.kl("sd"), "scaling_factor 0.18215 where this decoder has 0.13025. Presets that fit it: .*taesd"),
        (lambda: tiny.kl(latent_channels=16), "channels 16 where this decoder has 4. No preset fits"),
        (lambda: tiny.kl(shift_factor=0.2), "shift_factor 0.2 where this decoder has 0.0. No preset fits"),
        (lambda: tiny.kl(latents_mean=[0.0] * 4), "its own latents_mean. No preset fits"),
        (
            lambda: tiny.kl(
                block_out_channels=[32] * 3, down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3
            ),
            "spatial_factor 4 where this decoder has 8. No preset fits",
        ),
        (lambda: AutoencoderTiny(), "AutoencoderTiny has another latent space"),
    ],
)
def test_a_vae_of_another_latent_space_is_refused(vae: Any, sentence: str) -> None:
    pipe = Pipe(vae())
    original = pipe.vae.decoder
    for refused in (lambda: swap_decoder(pipe, tiny.decoder()), lambda: tiny.decoder().with_encoder(pipe.vae)):
        with pytest.raises(ValueError, match=sentence):
            refused()
    assert pipe.vae.decoder is original
    assert "save_pretrained" not in vars(pipe.vae)


@pytest.mark.parametrize("row", [torch.zeros(4), tiny.POST_QUANT[1] * 2, torch.full((4,), float("nan"))])
def test_a_post_quant_conv_that_cannot_be_inverted_is_refused(row: torch.Tensor) -> None:
    vae = tiny.kl()
    with torch.no_grad():
        vae.post_quant_conv.weight[0, :, 0, 0] = row
    with pytest.raises(ValueError, match=r"cannot be inverted.*replace the whole VAE"):
        tiny.decoder().inside(vae)


def test_a_vae_without_post_quant_conv_needs_no_inverse() -> None:
    vae, fast = tiny.kl(use_post_quant_conv=False), tiny.decoder()
    assert vae.post_quant_conv is None
    vae.decoder = fast.inside(vae)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(tiny.latents()).sample, fast.decode(tiny.latents()).sample, rtol=0, atol=2e-5)


@pytest.mark.parametrize("thing", [tiny.decoder, lambda: nn.Linear(2, 2), lambda: None], ids=["FastDecoder", "Linear", "None"])
def test_what_is_not_a_vae_is_a_type_error(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a diffusers VAE whose decoder can be replaced.*assign pipe.vae"):
        tiny.decoder().inside(thing())


def test_the_name_of_a_preset_is_enough() -> None:
    pipe = Pipe(tiny.kl())
    swap_decoder(pipe, "taesdxl")
    assert pipe.vae.decode(tiny.latents()).sample.shape == (1, 3, 64, 64)
    with pytest.raises(OSError, match="did you mean taesdxl"):
        swap_decoder(pipe, "taesdxll")


def test_a_decoder_of_another_number_of_channels_fits_its_own_vae() -> None:
    config = {"latent_space": "mine", "latent_channels": 16, "scaling_factor": 0.13025, "encoder": "none"}
    fast = SubpixelDecoder(widths=(8, 8, 8), blocks=(1, 1, 1), convs=1, **config).eval()
    vae, z = tiny.kl(latent_channels=16), torch.randn(1, 16, 4, 4)
    vae.decoder = fast.inside(vae)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z).sample, fast.decode(z).sample, rtol=0, atol=2e-5)
