"""A Subpixel decoder with fewer channels than the one it begins as."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fast_latent_decoders import FastDecoder, SubpixelDecoder

from .tiny import module, of_one_picture


@pytest.fixture
def thin() -> ModuleType:
    return module("thin")


def trained(block: str, widths: tuple[int, ...] = (8, 8, 6)) -> SubpixelDecoder:
    """A decoder in which no channel is idle: the last convolution of a block begins at zero."""
    model = SubpixelDecoder(widths=widths, blocks=(2, 1, 1)[: len(widths)], convs=2, block=block)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("block", ["tae", "residual"])
def test_channels_that_nobody_reads_go_and_nothing_changes(thin: ModuleType, block: str) -> None:
    small, z = trained(block), torch.randn(4, 4, 9, 7)
    large = SubpixelDecoder.from_config({**small.config, "widths": [12, 9, 10]})
    module("grow").grow(small, large, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for old, new in zip(small.decoder.modules(), large.decoder.modules(), strict=True):
            if isinstance(old, nn.Conv2d):  # new channels do not read each other either
                new.weight[:, old.in_channels :] = 0
        made = thin.thin(large, (8, 8, 6), z)
        torch.testing.assert_close(made.decode(z).sample, small.decode(z).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("widths", [(8, 8, 6), (8, 8)])
def test_what_the_others_say_of_a_channel_is_kept(thin: ModuleType, widths: tuple[int, ...]) -> None:
    """The last stage carries one channel that is twice another one, and one within its block is never above zero."""
    source, z = trained("residual", widths), torch.randn(4, 4, 9, 7)
    *_, up, block, _ = source.decoder.layers
    with torch.no_grad():
        for conv, phases in ((up[0], 4), (block.conv[-1], 1)):
            for parameter in conv.parameters():
                parameter[:phases] = 2 * parameter[phases : 2 * phases]
        block.conv[0].weight[3] = 0
        block.conv[0].bias[3] = -1
        made = thin.thin(source, (*widths[:-1], widths[-1] - 1), z)
        torch.testing.assert_close(made.decode(z).sample, source.decode(z).sample, rtol=0, atol=2e-3)
        with pytest.raises(AssertionError):  # one more is missed
            torch.testing.assert_close(thin.thin(source, (*widths[:-1], widths[-1] - 2), z).decode(z).sample, source.decode(z).sample, rtol=0, atol=2e-3)


def test_what_cannot_be_thinned_is_an_error(thin: ModuleType) -> None:
    for widths in ((8, 8), (8, 8, 7), (0, 8, 6)):
        with pytest.raises(ValueError, match=r"expected 3 widths from 1 to those of the source, \[8, 8, 6\], got"):
            thin.thin(trained("tae"), widths, torch.randn(1, 4, 8, 8))


def test_the_command_writes_what_train_can_begin_with(thin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["thin.py", "subpixel-small-sdxl", str(tmp_path / "thin"), "--widths", "88", "64", "--config", of_one_picture(tmp_path), "--crops", "8"]
    monkeypatch.setattr(sys, "argv", call)
    thin.main()
    assert float(capsys.readouterr().out.split(": ")[1].split(" dB")[0]) > 20
    assert FastDecoder.from_pretrained(tmp_path / "thin").config.widths == [88, 64]
    first = importlib.import_module("card").origin(str(tmp_path / "thin"))
    assert "# subpixel-small-sdxl, with fewer channels\n" in (tmp_path / "thin/README.md").read_text() and "Ollin Boer Bohan" in first["credit"]
    assert json.loads((tmp_path / "thin" / "run.json").read_text())["steps"] > 1000  # of what it was
    monkeypatch.setattr(sys, "argv", ["thin.py", "taesdxl", str(tmp_path / "other"), *call[3:]])
    with pytest.raises(SystemExit, match="expected a SubpixelDecoder, got TAEDecoder"):
        thin.main()
