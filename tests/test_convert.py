"""Tiny autoencoders' checkpoints to TAEDecoder and back: the same pictures, and nothing lost unsaid."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from fast_latent_decoders import SD, SDXL, TAEDecoder
from fast_latent_decoders.atomic import FileError
from fast_latent_decoders.convert import from_taesd, to_autoencoder_tiny, to_taesd


@pytest.fixture(scope="module")
def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(decoder_block_out_channels=(16,) * 4, encoder_block_out_channels=(64,) * 4).eval()


def ours(path: Path, latent_space: str = "sdxl") -> TAEDecoder:
    config, state = from_taesd(path, latent_space=latent_space)
    decoder = TAEDecoder(**config)
    decoder.load_state_dict(state, strict=True)
    return decoder.eval()


@torch.no_grad()
def assert_same_pictures(decoder: TAEDecoder, tiny: AutoencoderTiny) -> None:
    scaled = torch.randn(2, 4, 9, 7) * 1.5
    made = decoder.decode(scaled / decoder.config.scaling_factor).sample  # ours takes VAE units, AutoencoderTiny scaled ones
    assert (made - tiny.decode(scaled).sample).abs().max() < 1e-5


def original_layout(tiny: AutoencoderTiny) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in tiny.decoder.layers.state_dict().items():
        index, rest = name.split(".", 1)
        state[f"{int(index) + 1}.{rest}"] = tensor.contiguous()
    return state


def test_autoencoder_tiny_folder(tmp_path: Path, tiny: AutoencoderTiny, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "fast_latent_decoders.convert"):
        decoder = ours(tmp_path)
    assert "dropped the 67 tensors of its encoder" in caplog.text
    assert decoder.config.width == 16 and decoder.latent_space == SDXL
    assert_same_pictures(decoder, tiny)
    assert_same_pictures(ours(tmp_path / "diffusion_pytorch_model.safetensors", "sd"), tiny)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_taesd_file(tmp_path: Path, tiny: AutoencoderTiny, suffix: str) -> None:
    path = tmp_path / f"taesd_decoder{suffix}"
    state = original_layout(tiny)
    assert {name.split(".")[0] for name in state} >= {"1", "19"}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    decoder = ours(path, "sd")
    assert decoder.latent_space == SD
    assert_same_pictures(decoder, tiny)


def test_half_precision_is_widened(tmp_path: Path, tiny: AutoencoderTiny) -> None:
    save_file({name: tensor.half() for name, tensor in original_layout(tiny).items()}, tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in from_taesd(tmp_path / "a.safetensors")[1].values()} == {torch.float32}


@pytest.mark.parametrize(("blocks", "upsampling"), [((3, 3, 3, 1), "nearest"), ((1, 0, 2, 1), "bilinear")])
def test_exported_and_back(tmp_path: Path, tiny: AutoencoderTiny, blocks: tuple[int, ...], upsampling: str) -> None:
    decoder = TAEDecoder(width=8, blocks=blocks, upsampling=upsampling, latent_space="sd").eval()
    exported = to_autoencoder_tiny(decoder, encoder=tiny.encoder)
    assert exported.config.scaling_factor == 1.0
    assert_same_pictures(decoder, exported)
    exported.save_pretrained(tmp_path)
    loaded = AutoencoderTiny.from_pretrained(tmp_path)
    assert_same_pictures(decoder, loaded)
    again = ours(tmp_path, "sd")
    assert all(torch.equal(a, b) for a, b in zip(decoder.state_dict().values(), again.state_dict().values(), strict=True))
    for name in ("width", "upsampling", "latent_space"):
        assert again.config[name] == decoder.config[name]
    assert tuple(again.config.blocks) == blocks


def test_export_brings_the_tiny_encoder_of_its_latent_space() -> None:
    from fast_latent_decoders.encoder import load_tiny_encoder

    exported = to_autoencoder_tiny(TAEDecoder(width=8, latent_space="sd"))
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(exported.encode(x).latents, load_tiny_encoder(SD)(x))
    with pytest.raises(RuntimeError, match="no tiny encoder"):
        to_autoencoder_tiny(TAEDecoder(width=8, latent_space="other", latent_channels=16, scaling_factor=1.0))


def test_taesd_layout_and_back(tmp_path: Path, tiny: AutoencoderTiny) -> None:
    save_file(original_layout(tiny), tmp_path / "a.safetensors")
    exported = to_taesd(ours(tmp_path / "a.safetensors"))
    assert exported.keys() == original_layout(tiny).keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original_layout(tiny).items())
    with pytest.raises(ValueError, match="convert it to autoencoder-tiny"):
        to_taesd(TAEDecoder(width=8, blocks=(1, 1, 1, 1)))


@pytest.mark.parametrize("export", [to_taesd, to_autoencoder_tiny])
def test_four_widths_have_no_other_layout(export: Callable[[TAEDecoder], object]) -> None:
    with pytest.raises(ValueError, match="expected one width in all stages"):
        export(TAEDecoder(width=(16, 8, 8, 8), blocks=(1, 1, 1, 1)))
    assert export(TAEDecoder(width=(8, 8, 8, 8)))  # one width after all


def change(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    match what:
        case "missing":
            del state["3.conv.2.bias"]
        case "surplus":
            state["20.weight"] = torch.zeros(1)
        case "shape":
            state["3.conv.2.bias"] = torch.zeros(15)
        case "first":
            del state["1.weight"]
        case "encoder":
            state["0.weight"] = torch.zeros(1)
        case "other":
            return {"model.weight": torch.zeros(1)}
        case "flat":
            state["1.weight"] = torch.zeros(16)
    return state


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("missing", "lacks tensor decoder.layers.2.conv.2.bias"),
        ("surplus", "surplus tensor decoder.layers.19.weight"),
        ("shape", r"decoder.layers.2.conv.2.bias of shape \(16,\), got \(15,\)"),
        ("first", "no tiny decoder"),
        ("encoder", "TAESD's encoder"),
        ("other", "expected tensors named 1.weight .* got model.weight"),
        ("flat", "of shape .width, latent channels, 3, 3"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, tiny: AutoencoderTiny, what: str, expected: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(change(original_layout(tiny), what), path)
    with pytest.raises(ValueError, match=expected) as caught:
        from_taesd(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 99, None])
def test_broken_files(tmp_path: Path, suffix: str, content: bytes | None) -> None:
    path = tmp_path / f"a{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        from_taesd(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"act_fn": "silu"}, "act_fn 'silu'"),
        ({"decoder_block_out_channels": [16, 16, 8, 8]}, "widths"),
        ({"_class_name": "AutoencoderKL"}, "is of class AutoencoderKL"),
    ],
)
def test_configurations_that_are_no_tae(tmp_path: Path, tiny: AutoencoderTiny, changes: dict[str, object], expected: str) -> None:
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=expected):
        from_taesd(tmp_path)
