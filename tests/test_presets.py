"""Presets: decoders by name, and the names that a mistake was closest to."""

import sys

import pytest
import torch

from fast_latent_decoders import FastDecoder, LatentSpace, SubpixelDecoder, TAEDecoder, presets
from fast_latent_decoders import presets as _public
from fast_latent_decoders.latent_space import KNOWN, SD, SDXL
from fast_latent_decoders.presets import DEFAULT, PRESETS, folder, locate, names_for
from tests.pipelines import tiny

BASELINES = {"taesdxl": SDXL, "taesd": SD}


def test_presets_say_what_they_are() -> None:
    assert _public is presets
    found = presets()
    assert DEFAULT in found
    for name, preset in found.items():
        assert preset.name == name
        assert preset.class_name in FastDecoder.families
        assert preset.latent_space in KNOWN
        assert preset.licence
        assert preset.megabytes == preset.parameters * 2e-6
    found.clear()
    assert presets()  # a copy: nobody edits the list by accident


def test_sizes_are_counted_from_the_configuration() -> None:
    """TAESD's decoder has 1,222,531 parameters and 0.27 M multiply-accumulates per pixel."""
    preset = presets()["taesdxl"]
    assert preset.parameters == 1_222_531
    assert preset.mac_per_pixel == pytest.approx(0.270e6, rel=0.01)
    # The frame before costs one more 3x3 convolution in each block that sees it: two at 1/8, two at 1/4, one at 1/2.
    more = 9 * (2 * 128**2 / 64 + 2 * 64**2 / 16 + 48**2 / 4)
    assert presets()["subpixel-temporal-svd"].mac_per_pixel == presets()["subpixel-sd"].mac_per_pixel + more


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_load_by_name(name: str) -> None:
    fast = FastDecoder.from_pretrained(name)
    assert type(fast) is TAEDecoder
    assert fast.latent_space == BASELINES[name]
    assert fast.config.encoder == "embedded"
    assert presets()[name].location == str(folder(name))
    assert sum(parameter.numel() for parameter in fast.parameters()) == presets()[name].parameters
    half = TAEDecoder.from_pretrained(name, torch_dtype=torch.float16)
    assert half.dtype == torch.float16


def test_a_preset_of_another_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="taesdxl holds a TAEDecoder, expected SubpixelDecoder"):
        SubpixelDecoder.from_pretrained("taesdxl")


@pytest.mark.parametrize(("name", "near"), [("taesdx", "taesdxl"), ("subpixel_sdxl", "subpixel-sdxl"), ("TAESD", "taesd")])
def test_a_misspelt_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(OSError, match=f"no preset or folder called '{name}'; did you mean .*{near}") as error:
        FastDecoder.from_pretrained(name)
    assert all(preset in str(error.value) for preset in PRESETS)


def test_weights_that_are_not_at_hand_are_said_to_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until presets are on the Hub the error says where to get them; then their Hub id is what is loaded."""
    module = sys.modules[locate.__module__]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "__file__", "/nowhere/fast_latent_decoders/presets.py")
    with pytest.raises(OSError, match=r"'taesdxl' do not come with the installed package.*hub_cards/taesdxl of a checkout"):
        locate("taesdxl")
    assert PRESETS["taesdxl"].location is None
    monkeypatch.setattr(module, "HUB_ORG", "someone")
    assert locate("taesdxl") == "someone/taesdxl"


def test_folders_and_hub_ids_are_left_to_diffusers(tmp_path: object) -> None:
    for name in (str(tmp_path), "someone/something"):
        assert locate(name) == name


def test_presets_of_a_latent_space() -> None:
    assert "taesdxl" in names_for(SDXL) and "taesd" not in names_for(SDXL)
    assert "taesd" in names_for(LatentSpace("?", 4, 0.18215))
    assert not names_for(LatentSpace("?", 16, 0.18215))


def test_pictures_of_the_baselines_are_in_range() -> None:
    """The trained decoders centre about zero and seldom leave [-1, 1]."""
    for name, space in BASELINES.items():
        with torch.no_grad():
            sample = FastDecoder.from_pretrained(name).decode(tiny.latents(space.name)).sample
        assert sample.abs().quantile(0.9) < 1.3
        assert sample.std() > 0.2
