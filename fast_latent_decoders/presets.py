"""Presets: the decoders that have weights, by name."""

import difflib
import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .latent_space import KNOWN, LatentSpace

HUB_ORG: str | None = None  # set once the weights are on the Hub; presets then load from there when no folder has them


@dataclass(frozen=True)
class Preset:
    """A decoder with weights. Sizes are counted from its configuration."""

    name: str
    class_name: str
    latent_space: str
    licence: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def location(self) -> str | None:
        """The folder or Hub id of the weights; None where they are not at hand."""
        try:
            return locate(self.name)
        except OSError:
            return None

    @property
    def parameters(self) -> int:
        return _count(self.class_name, json.dumps(self.config))[0]

    @property
    def megabytes(self) -> float:
        """Size of the weights in float16, in 10^6 bytes."""
        return self.parameters * 2 / 1e6

    @property
    def mac_per_pixel(self) -> float:
        """Multiply-accumulates for each pixel of the picture, counted at 512 px; of a clip, for a frame that has one before it."""
        return _count(self.class_name, json.dumps(self.config))[1]


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("subpixel-sdxl", "SubpixelDecoder", "sdxl", "MIT", {"widths": (128, 64, 48), "blocks": (4, 3, 2), "convs": 3, "block": "tae"}),
        Preset("subpixel-small-sdxl", "SubpixelDecoder", "sdxl", "MIT", {"widths": (96, 64), "blocks": (3, 3), "convs": 3, "block": "tae"}),
        Preset("tae-192-sdxl", "TAEDecoder", "sdxl", "MIT", {"width": 192}),
        Preset(
            "efficientvit-sdxl",
            "EfficientViTDecoder",
            "sdxl",
            "MIT",
            {"widths": (224, 64, 48), "attention_blocks": 8, "residual_blocks": (4, 3, 2), "convs": 3, "block": "tae"},
        ),
        Preset("subpixel-sd", "SubpixelDecoder", "sd", "MIT", {"widths": (128, 64, 48), "blocks": (4, 3, 2), "convs": 3, "block": "tae"}),
        Preset(
            "subpixel-temporal-svd",
            "SubpixelTemporalDecoder",
            "sd",
            "MIT",
            {"widths": (128, 64, 48), "blocks": (4, 3, 2), "convs": 3, "block": "tae", "memory": (2, 2, 1)},
        ),
        Preset("tae-192-svd", "TAEDecoder", "sd", "MIT", {"width": 192}),
        Preset("tae-temporal-svd", "TAETemporalDecoder", "sd", "MIT", {"width": 192}),
        Preset(
            "efficientvit-svd",
            "EfficientViTDecoder",
            "sd",
            "MIT",
            {"widths": (224, 64, 48), "attention_blocks": 8, "residual_blocks": (4, 3, 2), "convs": 3, "block": "tae"},
        ),
        Preset("taesdxl", "TAEDecoder", "sdxl", "MIT", {"width": 64}),
        Preset("taesd", "TAEDecoder", "sd", "MIT", {"width": 64}),
    )
}
DEFAULT = "subpixel-sdxl"


def presets() -> dict[str, Preset]:
    """Name -> what it is: class, latent space, parameters, MB, MAC per pixel, licence, where its weights are."""
    return dict(PRESETS)


def names_for(space: LatentSpace) -> list[str]:
    """The presets for this latent space, whatever it is called."""
    return [name for name, preset in PRESETS.items() if replace(KNOWN[preset.latent_space], name=space.name) == space]


def check_space(vae: Any, mine: LatentSpace) -> None:
    """Raises ValueError where `vae` has another latent space than `mine`; the message names the presets that fit it."""
    config = vae.config
    theirs = LatentSpace(
        name="?",
        channels=getattr(config, "latent_channels", mine.channels),
        scaling_factor=getattr(config, "scaling_factor", None) or 1.0,
        shift_factor=getattr(config, "shift_factor", None) or 0.0,
        spatial_factor=2 ** (len(config.block_out_channels) - 1),
    )
    facts = {key: (getattr(mine, key), getattr(theirs, key)) for key in ("channels", "scaling_factor", "shift_factor", "spatial_factor")}
    wrong = [f"{key} {there} where this decoder has {here}" for key, (here, there) in facts.items() if abs(here - there) > 1e-6]
    has_mean = getattr(config, "latents_mean", None) is not None  # a pipeline would shift and scale by it, per channel
    if has_mean or wrong:
        fitting = [] if has_mean else names_for(theirs)
        raise ValueError(
            f"this {type(vae).__name__} has another latent space than {mine.name!r}: {'; '.join(wrong) or 'its own latents_mean'}. "
            + (f"Presets that fit it: {', '.join(fitting)}" if fitting else "No preset fits it")
        )


def folder(name: str) -> Path:
    """The folder of a preset or tiny encoder: in the installed package, or in the checkout it runs from.

    Raises:
        OSError: the weights are in neither; the message says where to get them.
    """
    package = Path(__file__).parent
    for parent in (package, package.parent):
        if (found := parent / "hub_cards" / name / "config.json").exists():
            return found.parent
    raise OSError(
        f"the weights of {name!r} do not come with the installed package; they are in the folder hub_cards/{name} of a checkout "
        f"of the repository: pass that folder's path, or install the checkout with pip install -e"
    )


def locate(name: str) -> str:
    """What diffusers should load for `name`: a preset's folder or Hub id; anything else is a folder or Hub id already.

    Raises:
        OSError: neither a preset, nor a folder, nor of the form of a Hub id; the message names the nearest presets.
    """
    if name in PRESETS:
        try:
            return str(folder(name))
        except OSError:
            if HUB_ORG is None:
                raise
            return f"{HUB_ORG}/{name}"
    if "/" not in name and "\\" not in name and not Path(name).exists():
        near = difflib.get_close_matches(name, PRESETS, n=2) or list(PRESETS)
        raise OSError(f"there is no preset or folder called {name!r}; did you mean {' or '.join(near)}? Presets: {', '.join(PRESETS)}")
    return name


@cache
def _count(class_name: str, config: str) -> tuple[int, float]:
    """Parameters, and multiply-accumulates per pixel of one more frame at 512 px, from a network without weights; its configuration is JSON."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from .decoder import FastDecoder

    with torch.device("meta"):
        decoder = FastDecoder.families[class_name](**json.loads(config))
        counted = []
        for frames in (1, 2):  # a clip's first frame has nothing before it to look at
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                decoder.decoder(torch.empty(frames, decoder.config.latent_channels, 64, 64), frames)
            counted.append(counter.get_total_flops())
    return sum(p.numel() for p in decoder.parameters()), (counted[1] - counted[0]) / 2 / 512**2
