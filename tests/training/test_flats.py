"""Flat colours as an endless surface shows them: the loss term, and the fit of a last layer to them."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fast_latent_decoders import FastDecoder, SubpixelDecoder

from .families import FAMILIES, made
from .tiny import config, module, run


@pytest.fixture
def flats() -> ModuleType:
    return module("flats")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    srgb = torch.rand(200, 3, generator=generator)
    latent = torch.cat([2 * srgb - 1, srgb[:, :1]], 1)
    save_file({"srgb": srgb, "latent": latent}, tmp_path / "colours.safetensors")
    return tmp_path / "colours.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "temporal"])
def test_a_few_latents_show_the_inside_of_a_large_surface(flats: ModuleType, family: str) -> None:
    """2x2 latents repeated endlessly: what the middle of a picture shows that no border reaches, and no statistics of all of it."""
    network, z = made(family).decoder, torch.randn(3, 4, 1, 1)
    halo = network.halo()
    side = 2 * ((halo or 0) + 2)
    large = network(z.expand(-1, -1, side, side))
    with flats.endless(network):
        small, wider = network(z.expand(-1, -1, 2, 2)), network(z.expand(-1, -1, 4, 4))
    torch.testing.assert_close(small.repeat(1, 1, 2, 2), wider, rtol=1e-4, atol=1e-4)
    if halo is not None:
        torch.testing.assert_close(small, large[..., 4 * side - 8 : 4 * side + 8, 4 * side - 8 : 4 * side + 8], rtol=0, atol=1e-4)
    torch.testing.assert_close(network(z.expand(-1, -1, side, side)), large)  # as it was


@torch.no_grad()
def test_a_norm_over_the_whole_picture_is_shown_pictures(flats: ModuleType) -> None:
    """Its surfaces have a border, as measured ones do; fitted to them, colours come nearer in the middle that is measured, and of others too."""
    network = made("temporal").decoder
    srgb = torch.rand(8 * flats.FLAT_COLOURS, 3, generator=torch.Generator().manual_seed(0))
    latent = torch.cat([2 * srgb - 1, srgb[:, :1]], 1)
    z, target, frames = flats.surfaces(network, srgb, latent)
    assert (z.shape, target.shape, frames) == ((8, 4, 32, 32), (8, 3, 256, 256), 1)
    assert torch.equal(z[1, :, 0, 0], latent[flats.FLAT_COLOURS])
    before = network(z[:1])
    with flats.endless(network):
        assert torch.equal(network(z[:1]), before)
    assert flats.flat(network, {"srgb": srgb, "latent": latent}, flats.FLAT_COLOURS, 0) > 0

    def error() -> float:
        others = slice(1, None, 2 * flats.FLAT_COLOURS)
        decoded = network(latent[others, :, None, None].expand(-1, -1, 32, 32))[..., 64:-64, 64:-64]
        return (decoded - (2 * srgb[others, :, None, None] - 1)).abs().mean().item()

    was, fit = error(), module("fit").LastLayerFit(network)
    module("recolour").add_flat(fit, srgb, latent, 1.0)
    fit.solve()
    assert error() < 0.5 * was


def test_a_network_is_as_it_was_where_something_fails(flats: ModuleType) -> None:
    network, z = made("subpixel").decoder, torch.randn(1, 4, 3, 5)
    before = network(z)
    with pytest.raises(ZeroDivisionError), flats.endless(network):
        assert not torch.equal(network(z), before)
        1 / 0  # noqa: B018
    assert torch.equal(network(z), before)


def test_flat_colours_beyond_white_and_black_cost_nothing(flats: ModuleType) -> None:
    class Constant(torch.nn.Module):
        mixes_frames = False

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def forward(self, z: Tensor, frames: int) -> Tensor:
            return self.value.expand(len(z), 3, 16, 16)

    white = {"srgb": torch.ones(4, 3), "latent": torch.randn(4, 4)}
    assert flats.flat(Constant(1.5), white, 8, 0) == 0
    assert flats.flat(Constant(0.5), white, 8, 0) == 0.5


def test_a_run_learns_them(tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path, "run")
    common = ["gan.weight=0", "branches=true", "steps=40", "lr=3e-3", f"stand_in.colours={colours}", "stand_in.transplants=0", "stages=[{crop: 32, batch: 4}]"]
    for name, losses in (("without", "{l1: 1}"), ("with", "{l1: 1, flat: 5}")):
        run(made, *common, f"losses={losses}", f"out={tmp_path / name}", monkeypatch=monkeypatch)
    errors = []
    for name in ("without", "with"):
        network = FastDecoder.from_pretrained(tmp_path / name / "export").float().decoder
        held = {key: value for key, value in zip(("srgb", "latent"), (torch.rand(64, 3, generator=torch.Generator().manual_seed(1)),) * 2, strict=True)}
        held["latent"] = torch.cat([2 * held["srgb"] - 1, held["srgb"][:, :1]], 1)
        errors.append(module("flats").flat(network, held, 64, 0).item())
    assert errors[1] < 0.8 * errors[0]
    logged = [json.loads(line) for line in (tmp_path / "with/log.jsonl").read_text().splitlines()]
    assert "flat" in [entry for entry in logged if "norm" in entry][-1]
    assert "| `flat` | 5 |" in (tmp_path / "with/export/README.md").read_text()


def test_the_term_needs_colours(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"flat needs stand_in\.colours"):
        module("config").read_config(config(tmp_path, "run"), ["losses={l1: 1, flat: 1}"])


def test_a_last_layer_is_fitted_to_them(tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    SubpixelDecoder(widths=(16, 8, 8), blocks=(1, 1, 1), convs=1).save_pretrained(tmp_path / "begun")
    (tmp_path / "begun/run.json").write_text('{"steps": 7}')
    common = ["gan.weight=0", "steps=20", f"stand_in.colours={colours}", f"init={tmp_path / 'begun'}"]
    run(config(tmp_path, "run"), *common, monkeypatch=monkeypatch)
    source, out = tmp_path / "run/export", tmp_path / "recoloured"

    def recolour(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["recolour.py", *arguments])
        module("recolour").main()

    recolour(str(source), str(out), "--crops", "4", "--side", "64", "--weight", "3")
    record, ran = (json.loads((folder / "run.json").read_text()) for folder in (out / "export", source))
    assert record["val"]["flat_psnr"] > record["recoloured"]["val_before"]["flat_psnr"] + 1
    assert (record["steps"], record["before"]) == (ran["steps"], {"steps": 7})  # the run's own past, not the run itself
    first, last = (FastDecoder.from_pretrained(folder).float().decoder.state_dict() for folder in (source, out / "export"))
    assert [key for key, value in first.items() if not torch.equal(value, last[key])] == list(first)[-2:]
    assert "fitted to flat colours" in (out / "export/README.md").read_text()
    for wrong, said in (
        ((str(source), str(out)), "give another folder"),
        ((str(tmp_path), str(tmp_path / "new")), "has no run.json"),
        ((str(source), str(tmp_path / "new"), "--side", "60"), "multiple of 8 px"),
    ):
        with pytest.raises(SystemExit):
            recolour(*wrong)
        assert said in capsys.readouterr().err
    run(config(tmp_path, "plain"), "gan.weight=0", "steps=4", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit):
        recolour(str(tmp_path / "plain/export"), str(tmp_path / "new"))
    assert "without real flat colours" in capsys.readouterr().err
