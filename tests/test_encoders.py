"""The encoders of socket A: the embedded tiny one, an external VAE's, none."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fast_latent_decoders import FastDecoder, SubpixelDecoder, swap_decoder
from tests.pipelines import tiny

# A smooth ramp of colours, as a picture in [-1, 1].
RAMP = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij"))
PICTURE = torch.cat([RAMP, -RAMP[:1]])[None]

warns = pytest.warns(UserWarning, match="stand-in for the VAE's own; pass encoder=vae")


class Pipe:
    def __init__(self, vae: Any) -> None:
        self.vae = vae


@pytest.mark.parametrize(("name", "tolerance"), [("taesdxl", 0.1), ("taesd", 0.1)])
def test_the_embedded_encoder_and_its_decoder_are_a_pair(name: str, tolerance: float) -> None:
    """Encoded and decoded, in VAE units both ways, the picture comes back."""
    fast = FastDecoder.from_pretrained(name)
    with torch.no_grad(), warns:
        latents = fast.encode(PICTURE).latent_dist.sample(torch.Generator())
    assert latents.shape == (1, 4, 8, 8)
    with torch.no_grad():
        assert (fast.decode(latents).sample - PICTURE).abs().mean() < tolerance
    assert fast.encode(PICTURE, return_dict=False)[0].mode().equal(latents)


def test_it_says_once_that_it_is_a_stand_in(recwarn: pytest.WarningsRecorder) -> None:
    fast = tiny.decoder(encoder="embedded")
    for _ in range(3):
        fast.encode(PICTURE)
    assert len([w for w in recwarn if "stand-in" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:encoding with the tiny")
def test_it_stays_out_of_the_module_tree_and_follows_the_decoder() -> None:
    """Not counted, not saved; cast when it is used."""
    fast = tiny.decoder(encoder="embedded")
    count, names = fast.num_parameters(), list(fast.state_dict())
    assert fast.encode(PICTURE).latent_dist.mode().dtype == torch.float32
    fast.to(torch.bfloat16)
    assert fast.encode(PICTURE).latent_dist.mode().dtype == torch.bfloat16
    assert fast.num_parameters() == count
    assert list(fast.state_dict()) == names


def test_a_latent_space_without_a_tiny_encoder_says_so() -> None:
    shape = {"widths": (8, 8, 8), "blocks": (1, 1, 1), "convs": 1}
    fast = SubpixelDecoder(**shape, latent_space="mine", latent_channels=4, scaling_factor=0.3)
    with pytest.raises(RuntimeError, match=r"no tiny encoder for the latent space 'mine' \(there are: sdxl, sd\); pass encoder=vae"):
        fast.encode(PICTURE)


@pytest.mark.parametrize("make", [lambda: tiny.kl("sd"), tiny.temporal_kl], ids=["KL", "SVD"])
def test_an_external_encoder_is_the_vae_s(make: Any) -> None:
    vae, fast = make(), tiny.decoder(space="sd")
    count = fast.num_parameters()
    assert fast.with_encoder(vae) is fast
    assert fast.config.encoder == "external"
    assert fast.num_parameters() == count
    distribution = fast.encode(PICTURE).latent_dist
    expected = vae.encode(PICTURE).latent_dist
    assert torch.equal(distribution.mode(), expected.mode())
    samples = [d.sample(torch.Generator().manual_seed(1)) for d in (distribution, expected)]
    assert torch.equal(*samples)


def test_given_to_from_pretrained(tmp_path: Any) -> None:
    tiny.decoder().save_pretrained(tmp_path)
    vae = tiny.kl()
    fast = FastDecoder.from_pretrained(tmp_path, encoder=vae)
    assert torch.equal(fast.encode(PICTURE).latent_dist.mode(), vae.encode(PICTURE).latent_dist.mode())
    fast.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="encoder='external' and none was given: pass encoder=vae"):
        FastDecoder.from_pretrained(tmp_path).encode(PICTURE)


def test_the_vae_s_decoder_is_not_held() -> None:
    """Nor what a swap left on the VAE: neither its kept decoder nor the VAE itself."""
    for swap in (False, True):
        vae = tiny.kl()
        original = weakref.ref(vae.decoder)
        if swap:
            swap_decoder(Pipe(vae), tiny.decoder(), keep=True)
        fast, whole = tiny.decoder().with_encoder(vae), weakref.ref(vae)
        del vae
        gc.collect()
        assert original() is None
        assert whole() is None
        assert fast.encode(PICTURE).latent_dist.mode().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_keeps_its_own_dtype(dtype: torch.dtype) -> None:
    vae = tiny.kl("sd", dtype=dtype)
    fast = tiny.decoder(space="sd").with_encoder(vae)
    assert fast.encode(PICTURE).latent_dist.mode().dtype == dtype
    fast.to(torch.float64).to(torch.float32)
    assert vae.dtype == dtype
    wide = tiny.decoder(space="sd").to(dtype).with_encoder(tiny.kl("sd"))
    assert wide.encode(PICTURE.to(dtype)).latent_dist.mode().dtype == torch.float32


@pytest.mark.parametrize("swap", [False, True])
def test_an_external_vae_that_upcasts_encodes_in_float32(swap: bool) -> None:
    """SDXL's VAE overflows in float16; no pipeline sees its force_upcast any more, so `encode` does it."""
    vae = tiny.kl(dtype=torch.float16)
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(3e4)
    assert not vae.encode(PICTURE.half() * 0 + 0.9).latent_dist.mode().isfinite().all()
    if swap:
        swap_decoder(Pipe(vae), tiny.decoder())
    fast = tiny.decoder().to(torch.float16).with_encoder(vae)
    assert fast.encode(PICTURE.half() * 0 + 0.9).latent_dist.mode().isfinite().all()
    assert vae.dtype == torch.float16


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 8, 8), torch.zeros(3, 8, 8)])
def test_pictures_of_another_form_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected pictures \(N, 3, H, W\) in \[-1, 1\], got shape"):
        tiny.decoder(encoder="embedded").encode(x)


def test_a_module_that_is_not_a_vae_is_refused_as_encoder() -> None:
    with pytest.raises(TypeError, match="expected a diffusers VAE"):
        tiny.decoder().with_encoder(nn.Linear(2, 2))
