"""The encoder that latents come from: the stand-in's cures, and a real VAE."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .tiny import SHARED, SPACE, frozen, needs_shared, tiny_vae


def test_redrawn_weights_stay_in_the_rounding_box() -> None:
    encoder = frozen()
    encoder.redraw(torch.Generator().manual_seed(0))
    moved = 0
    for key, value in encoder.network.state_dict().items():
        stored = encoder.stored[key]
        if key.endswith("bias"):
            assert torch.equal(value, stored)
            continue
        step = (2.0 ** (stored.abs().clamp_min(1e-9).log2().floor() - 3)).clamp_min(2.0**-9)
        assert ((value - stored).abs() <= step / 2 + 1e-7).all()
        moved += int((value != stored).sum())
    assert moved > 1_000_000
    encoder.redraw(None)
    assert all(torch.equal(value, encoder.stored[key]) for key, value in encoder.network.state_dict().items())


def test_transplanted_colours(tmp_path: Path) -> None:
    """Amplitude 0 is the real colour's latent and a flat target; texture adds what the encoder makes of it."""
    colours = {"srgb": torch.tensor([[0.2, 0.5, 0.9], [0.6, 0.1, 0.3]]), "latent": torch.tensor([[1.0, -2, 0.5, 3], [0.1, 0.2, 0.3, 0.4]])}
    save_file(colours, tmp_path / "colours.safetensors")
    encoder = frozen({"colours": str(tmp_path / "colours.safetensors")})
    texture = torch.rand(2, 3, 64, 64) - 0.5
    z, target = encoder.transplant(texture, torch.tensor([0.0, 0.2]), torch.tensor([0, 1]))
    assert torch.allclose(z[0], colours["latent"][0][:, None, None].expand(4, 8, 8), atol=1e-5)
    assert torch.allclose(target[0], (colours["srgb"][0] * 2 - 1)[:, None, None].expand(3, 64, 64), atol=1e-6)
    flat = (colours["srgb"][1:] * 2 - 1)[:, :, None, None].expand(1, 3, 64, 64)
    expected = colours["latent"][1:, :, None, None] + encoder.encode(target[1:]) - encoder.encode(flat)
    assert torch.allclose(z[1:], expected, atol=1e-4)


@needs_shared
def test_colour_table_has_its_axes_the_right_way_round() -> None:
    """The check value of the table's description, on other colours: rms of real minus (stand-in + table), per channel;
    with the axes the wrong way round it is .072 .074 .280 .124."""
    weights, real = SHARED / "weights/taesdxl_colour_lut.safetensors", SHARED / "data/real_latents/sdxl/vae_constant_colours.safetensors"
    encoder = frozen({"colour_table": str(weights), "colours": str(real)})
    colours, latents = (encoder.colours[key][::61] for key in ("srgb", "latent"))
    flat = (colours * 2 - 1)[:, :, None, None].expand(-1, -1, 104, 104)
    z = encoder.encode(flat) + encoder.table_at(flat)
    rms = (latents - z[:, :, 6, 6]).square().mean(0).sqrt()
    assert torch.allclose(rms, torch.tensor([0.027, 0.039, 0.094, 0.055]), atol=0.02)


def test_a_real_vae_gives_scaled_latents_of_its_posterior(tmp_path: Path) -> None:
    vae = tiny_vae(tmp_path / "vae", 16).eval()
    encoder = frozen(path=str(tmp_path / "vae"), **SPACE)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    assert torch.allclose(encoder.encode(x), (posterior.mode() - 0.1) * 0.7, atol=1e-5)
    draws = [encoder.encode(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2], atol=1e-3)
    with pytest.raises(ValueError, match=r"is a real VAE, and stand_in\.redraw"):
        frozen({"redraw": True}, path=str(tmp_path / "vae"), **SPACE)
    with pytest.raises(ValueError, match="another latent space"):
        frozen(path=str(tmp_path / "vae"))
    with pytest.raises(ValueError, match="no VAE that diffusers can load"):
        frozen(path=str(tmp_path))
    with pytest.raises(ValueError, match="no tiny encoder for the latent space 'mine'"):
        frozen(**SPACE)


@needs_shared
def test_a_tiny_encoder_of_sixteen_channels_from_its_file() -> None:
    path = str(SHARED / "weights/taesd3_encoder.safetensors")
    encoder = frozen({"redraw": True}, path=path, **SPACE)
    assert encoder.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)
    with pytest.raises(ValueError, match="16 channels, and the decoder takes 4"):
        frozen(path=path)
    with pytest.raises(ValueError, match="holds no encoder"):
        frozen(path=str(SHARED / "weights/taesd3_decoder.safetensors"), **SPACE)
