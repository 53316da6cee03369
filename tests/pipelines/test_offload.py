"""Model, sequential and group offload, enabled before and after a swap. `device="cpu"` runs every hook without an accelerator."""

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from diffusers.hooks import apply_group_offloading

from fast_latent_decoders import FastDecoder, restore_decoder, swap_decoder
from tests.pipelines import tiny


def _sequential(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does to the VAE. Asked for device="cpu" it would say cpu:0 to accelerate, which then
    turns parameters into plain tensors and fails, in stock pipelines too."""
    cpu_offload(pipe.vae, torch.device("cpu"), offload_buffers=len(pipe.vae._parameters) > 0)


def _group(pipe: Any, level: str) -> None:
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    apply_group_offloading(pipe.vae, onload_device=cpu, offload_device=cpu, offload_type=level, **blocks)


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": _sequential,
    "group by block": lambda pipe: _group(pipe, "block_level"),
    "group by leaf": lambda pipe: _group(pipe, "leaf_level"),
}
PUT_IN: dict[str, Callable[[Any, FastDecoder], None]] = {
    "whole": lambda pipe, fast: setattr(pipe, "vae", fast),
    "swapped": lambda pipe, fast: swap_decoder(pipe, fast, keep=True),
    "by hand": lambda pipe, fast: setattr(pipe.vae, "decoder", fast.inside(pipe.vae)),
}


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    pipe = tiny.sdxl()
    pipe.vae = tiny.decoder()
    return tiny.run(pipe)


@pytest.mark.parametrize("way", PUT_IN)
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_picture_is_the_same(way: str, offload: str, order: str, expected: np.ndarray) -> None:
    """Offload enabled before or after the swap; called twice, since hooks re-arm after a call."""
    pipe, fast = tiny.sdxl(), tiny.decoder()
    if order == "before":
        OFFLOADS[offload](pipe)
    PUT_IN[way](pipe, fast)
    if order == "after":
        OFFLOADS[offload](pipe)
    for _ in range(2):
        np.testing.assert_allclose(tiny.run(pipe), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", ["before", "after"])
def test_sequential_offload_takes_the_swapped_weights_too(order: str) -> None:
    """Between calls every weight of the VAE, the socket's included, is on the meta device; the swapped-in decoder is as it was."""
    pipe, fast = tiny.sdxl(), tiny.decoder()
    if order == "before":
        OFFLOADS["sequential"](pipe)
    swap_decoder(pipe, fast)
    if order == "after":
        OFFLOADS["sequential"](pipe)
    tiny.run(pipe)
    assert {parameter.device.type for parameter in pipe.vae.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in fast.parameters()} == {"cpu"}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_restore_under_offload(offload: str, order: str) -> None:
    """The kept decoder comes back hooked like its VAE, whether it was taken out with or without hooks."""
    pipe = tiny.sdxl()
    original = tiny.run(pipe)
    if order == "before":
        OFFLOADS[offload](pipe)
    swap_decoder(pipe, tiny.decoder(), keep=True)
    if order == "after":
        OFFLOADS[offload](pipe)
    tiny.run(pipe)
    restore_decoder(pipe)
    if offload == "sequential":
        assert {parameter.device.type for parameter in pipe.vae.parameters()} == {"meta"}
    np.testing.assert_allclose(tiny.run(pipe), original, rtol=0, atol=2e-5)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_float32_encode_of_a_swapped_vae_under_offload(offload: str) -> None:
    """Image-to-image in float16: the same picture as without offload."""
    pictures = []
    for enable in (lambda pipe: None, OFFLOADS[offload]):
        pipe = tiny.image_to_image(tiny.sdxl(torch.float16))
        enable(pipe)
        swap_decoder(pipe, tiny.decoder())
        encoded: list[torch.dtype] = []
        pipe.vae.encoder.conv_in.register_forward_pre_hook(lambda *args, seen=encoded: seen.append(args[1][0].dtype))
        pictures.append(tiny.run(pipe))
        assert encoded == [torch.float32]
        assert pipe.vae.dtype == torch.float16
    np.testing.assert_allclose(*pictures, rtol=0, atol=4e-3)


@pytest.mark.filterwarnings("ignore:encoding with the tiny")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_encoders_of_a_whole_fast_vae_under_offload(offload: str) -> None:
    """The embedded encoder, and an external one, work outside the hooks."""
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    for encoder in ("embedded", "external"):
        encoded = []
        for enable in (lambda pipe: None, OFFLOADS[offload]):
            pipe = tiny.sdxl()
            fast = tiny.decoder(encoder="embedded")
            pipe.vae = fast.with_encoder(tiny.kl()) if encoder == "external" else fast
            enable(pipe)
            encoded.append(pipe.vae.encode(x).latent_dist.mode())
        assert torch.equal(*encoded)


@pytest.mark.parametrize("offload", ["group by block", "group by leaf"])
def test_group_offload_lets_go_of_the_old_decoder(offload: str) -> None:
    pipe = tiny.sdxl()
    OFFLOADS[offload](pipe)
    old = weakref.ref(pipe.vae.decoder)
    swap_decoder(pipe, tiny.decoder())
    gc.collect()
    assert old() is None


def test_decode_and_encode_trigger_the_hook_of_model_offload() -> None:
    """Only `forward` is hooked by itself (CONTRACT 7.3): an execution device of meta shows whether weights moved."""
    for call in (lambda vae: vae.decode(tiny.latents()), lambda vae: vae.encode(torch.zeros(1, 3, 16, 16))):
        fast = tiny.decoder()
        fast._hf_hook = CpuOffload(execution_device="meta")
        with suppress(RuntimeError):  # nothing can be computed there
            call(fast)
        assert fast.device.type == "meta"


def test_swapping_in_an_offloaded_decoder_is_refused() -> None:
    pipe = tiny.sdxl()
    pipe.vae = tiny.decoder()
    OFFLOADS["sequential"](pipe)
    with pytest.raises(ValueError, match=r"weights are offloaded; load it again"):
        pipe.vae.inside(tiny.kl())


def test_model_offload_swapped_before_and_after_hooks_the_same_modules() -> None:
    for order in ("before", "after"):
        pipe = tiny.sdxl()
        if order == "before":
            OFFLOADS["model"](pipe)
        swap_decoder(pipe, tiny.decoder())
        if order == "after":
            OFFLOADS["model"](pipe)
        assert hasattr(pipe.vae, "_hf_hook")
        assert not hasattr(pipe.vae.decoder, "_hf_hook")
