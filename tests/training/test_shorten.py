"""A Subpixel decoder that begins as the first stages of a TAE."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fast_latent_decoders import FastDecoder, SubpixelDecoder, TAEDecoder

from .tiny import module, of_one_picture


@pytest.fixture
def shorten() -> ModuleType:
    return module("shorten")


@pytest.mark.parametrize("width", [8, (16, 12, 8, 4)])
def test_what_the_head_sees_is_the_sources(shorten: ModuleType, width: int | tuple[int, ...]) -> None:
    """Away from the borders, where folded upsampling may differ from the second stage on."""
    source, z = TAEDecoder(width=width, blocks=(2, 1, 2, 1)), torch.randn(1, 4, 24, 24)
    short = shorten.shorten(source, (2, 1, 2))
    assert short.config.widths == ([8, 8, 8] if width == 8 else [16, 12, 8])
    seen: list[torch.Tensor] = []
    short.decoder.layers[-1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    ups = [layer for layer in source.decoder.layers if isinstance(layer, nn.Upsample)]
    ups[-1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        short.decoder(z)
        source.decoder(z)
    mine, theirs = seen
    assert mine.shape == theirs.shape == (1, short.config.widths[-1], 96, 96)
    torch.testing.assert_close(mine[..., 4:-4, 4:-4], theirs[..., 4:-4, 4:-4], rtol=0, atol=1e-5)


def test_blocks_are_left_out_from_a_stages_end(shorten: ModuleType) -> None:
    source = TAEDecoder(width=8, blocks=(3, 2, 2, 1))
    short = shorten.shorten(source, (1, 2, 1))
    blocks = [layer for layer in source.decoder.layers if type(layer).__name__ == "TAEBlock"]
    kept = [layer for layer in short.decoder.layers if type(layer).__name__ == "TAEBlock"]
    for mine, number in zip(kept, (0, 3, 4, 5), strict=True):
        assert torch.equal(mine.conv[4].weight, blocks[number].conv[4].weight)


def test_another_width_at_half_resolution_is_new_from_there_on(shorten: ModuleType) -> None:
    source, z = TAEDecoder(width=8, blocks=(1, 1, 1, 1)), torch.randn(1, 4, 6, 6)
    plain, narrow = shorten.shorten(source, (1, 1, 1)), shorten.shorten(source, (1, 1, 1), half=4)
    assert narrow.config.widths == [8, 8, 4]
    with torch.no_grad():
        torch.testing.assert_close(narrow.decoder.layers[:5](z), plain.decoder.layers[:5](z))  # up to the last block at 1/4
        assert narrow.decode(z).sample.shape == (1, 3, 48, 48)


def test_without_a_stage_at_half_resolution_the_head_stands_there(shorten: ModuleType) -> None:
    source, z = TAEDecoder(width=8, blocks=(1, 2, 1, 1)), torch.randn(1, 4, 6, 6)
    longer, shallow = shorten.shorten(source, (1, 2, 1)), shorten.shorten(source, (1, 2))
    assert shallow.config.widths == [8, 8]
    with torch.no_grad():
        torch.testing.assert_close(shallow.decoder.layers[:6](z), longer.decoder.layers[:6](z))
        assert shallow.decode(z).sample.shape == (1, 3, 48, 48)


def test_a_subpixel_decoder_is_shortened_alike(shorten: ModuleType) -> None:
    source = SubpixelDecoder(widths=[8, 8, 4], blocks=[1, 2, 2], convs=2, block="residual")
    for parameter in source.parameters():  # the last convolution of a block begins at zero
        torch.nn.init.normal_(parameter, std=0.1)
    short, z = shorten.shorten(source, (1, 1, 1)), torch.randn(1, 4, 5, 6)
    assert (tuple(short.config.widths), tuple(short.config.blocks), short.config.convs, short.config.block) == ((8, 8, 4), (1, 1, 1), 2, "residual")
    for block in (source.decoder.layers[4], source.decoder.layers[7]):  # the last ones at 1/4 and 1/2: zeroed, they are not there
        torch.nn.init.zeros_(block.conv[-1].weight)
        torch.nn.init.zeros_(block.conv[-1].bias)
    short.decoder.layers[-1].load_state_dict(source.decoder.layers[-1].state_dict())
    torch.testing.assert_close(short.decoder(z), source.decoder(z))
    assert len(shorten.shorten(source, (1, 2)).config.widths) == 2
    with pytest.raises(ValueError, match="two or three block counts"):
        shorten.shorten(shorten.shorten(source, (1, 1)), (1, 1, 1))



def test_tiles_of_its_blocks_are_exact(shorten: ModuleType) -> None:
    short, z = shorten.shorten(TAEDecoder(width=8, blocks=(1, 1, 1, 1)), (1, 1, 1)), torch.randn(1, 4, 21, 13)
    with torch.no_grad():
        whole = short.decode(z).sample
        short.enable_tiling(5)
        torch.testing.assert_close(short.decode(z).sample, whole, rtol=0, atol=1e-5)


def test_what_cannot_be_shortened_is_an_error(shorten: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"from 1 to those of the source, \(1, 1, 1\), got \(2, 1, 1\)"):
        shorten.shorten(TAEDecoder(width=8, blocks=(1, 1, 1, 1)), (2, 1, 1))
    with pytest.raises(ValueError, match="expected two or three block counts"):
        shorten.shorten(TAEDecoder(width=8), (1,))
    with pytest.raises(ValueError, match="no width at 1/2 where there is no such stage"):
        shorten.shorten(TAEDecoder(width=8), (1, 1), half=4)
    with pytest.raises(ValueError, match="upsamples nearest, got bilinear"):
        shorten.shorten(TAEDecoder(width=8, upsampling="bilinear"), (1, 1, 1))
    with pytest.raises(ValueError, match="expected block to be one of residual, tae; got 'vit'"):
        SubpixelDecoder(block="vit")


def test_the_command_writes_what_train_can_begin_with(shorten: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["shorten.py", "taesdxl", str(tmp_path / "short"), "--config", of_one_picture(tmp_path), "--crops", "8"]
    monkeypatch.setattr(sys, "argv", call)
    shorten.main()
    assert float(capsys.readouterr().out.split(": ")[1].split(" dB")[0]) > 20
    short = FastDecoder.from_pretrained(tmp_path / "short")
    assert isinstance(short, SubpixelDecoder) and short.config.block == "tae"
    first = importlib.import_module("card").origin(str(tmp_path / "short"))
    assert first["licence"] == "mit" and "# taesdxl, shortened\n" in (tmp_path / "short/README.md").read_text()
    assert "Ollin Boer Bohan" in first["credit"]
    with pytest.raises(SystemExit):
        shorten.main()  # never writes over a folder
