"""Channels that no gradient reaches begin anew."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fast_latent_decoders import FastDecoder, SubpixelDecoder, SubpixelTemporalDecoder, TAEDecoder

from .tiny import module, of_one_picture


@pytest.fixture
def wake() -> ModuleType:
    return module("wake")


@pytest.mark.parametrize(
    "model",
    [
        TAEDecoder(width=8, blocks=(1, 1, 1, 1)),
        SubpixelDecoder(widths=(8, 8), blocks=(1, 1), convs=3, block="tae"),
        SubpixelTemporalDecoder(widths=(8, 8), blocks=(1, 1), convs=3, block="residual", memory=(1, 1)),
    ],
)
def test_a_sleeping_channel_gets_a_gradient_and_the_function_stays(wake: ModuleType, model: FastDecoder) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    conv = next(block for block in model.decoder.layers if hasattr(block, "conv")).conv
    torch.nn.init.constant_(conv[0].bias[2:3], -100)
    z, awake = torch.randn(4, 4, 9, 7), [conv[0].weight[:2].clone(), conv[2].weight[:, :2].clone()]
    with torch.no_grad():
        before = model.decode(z).sample
    assert wake.wake(model.decoder, z) >= 1
    torch.testing.assert_close(model.decode(z).sample, before, rtol=0, atol=1e-5)
    model.train().decode(z).sample.square().mean().backward()
    assert conv[0].bias[2].abs() < 1 and conv[0].weight[2].std() > 0
    assert (conv[2].weight[:, 2] == 0).all() and conv[2].weight.grad[:, 2].abs().max() > 0
    assert torch.equal(conv[0].weight[:2], awake[0]) and torch.equal(conv[2].weight[:, :2], awake[1])


def test_the_command_writes_what_train_can_begin_with(wake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["wake.py", "subpixel-temporal-svd", str(tmp_path / "awake"), "--config", of_one_picture(tmp_path), "--crops", "8"]
    monkeypatch.setattr(sys, "argv", call)
    wake.main()
    assert " channels begun anew, zero on 8 crops" in capsys.readouterr().out
    made = FastDecoder.from_pretrained(tmp_path / "awake")
    assert isinstance(made, SubpixelTemporalDecoder)
    assert "# subpixel-temporal-svd, with sleeping channels begun anew\n" in (tmp_path / "awake/README.md").read_text()
    assert (tmp_path / "awake" / "run.json").exists()
