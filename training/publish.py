"""Promote a run's export to a preset: hub_cards/<preset>/, which the package loads by name and the Hub gets as it is.

    python training/publish.py training/runs/tae-192-sdxl tae-192-sdxl [--force]

Refuses what should not bear the name: debug runs, runs that were not measured, another family or latent space, weights that
do not fit or are not finite. What is in hub_cards already is replaced only with --force, whole or not at all.
"""

import argparse
import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from card import header_of
from export import whole_folder
from safetensors.torch import load_file

from fast_latent_decoders import FastDecoder, presets

CARDS = Path(__file__).parent.parent / "hub_cards"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NEEDED = ("README.md", "config.json", WEIGHTS, "run.json")
KEPT = (*NEEDED, "quality.json", "speed.json")
SHORTEST = 1000  # steps; what is shorter was a trial


@dataclass(frozen=True)
class Wanted:
    """What a decoder must be to bear a preset's name."""

    class_name: str
    latent_space: str
    config: dict[str, Any] = field(default_factory=dict)


# The names of DESIGN 1.4. Sizes are the trainer's affair, except where the name tells them.
NAMES = {
    "subpixel-sdxl": Wanted("SubpixelDecoder", "sdxl"),
    "subpixel-small-sdxl": Wanted("SubpixelDecoder", "sdxl"),
    "tae-192-sdxl": Wanted("TAEDecoder", "sdxl", {"width": 192}),
    "efficientvit-sdxl": Wanted("EfficientViTDecoder", "sdxl"),
    "subpixel-sd": Wanted("SubpixelDecoder", "sd"),
    "subpixel-temporal-svd": Wanted("SubpixelTemporalDecoder", "sd"),
    "tae-192-svd": Wanted("TAEDecoder", "sd", {"width": 192}),
    "tae-temporal-svd": Wanted("TAETemporalDecoder", "sd", {"width": 192}),
    "efficientvit-svd": Wanted("EfficientViTDecoder", "sd"),
}


class RefusedError(ValueError):
    """Not to be published; the message is one sentence that says why, or what to do."""


def find_export(folder: Path) -> Path:
    """The export in a run's folder, or the folder itself if it is one."""
    for place in (folder / "export", folder):
        if (place / "config.json").is_file():
            if missing := [name for name in NEEDED if not (place / name).is_file()]:
                raise RefusedError(f"{place} lacks {', '.join(missing)}: let train.py finish the run, it writes them all")
            return place
    raise RefusedError(
        f"{folder} holds no export: expected export/config.json or config.json, which train.py writes when a run ends"
    )


def check_name(preset: str) -> Wanted:
    if preset in NAMES:
        return NAMES[preset]
    if preset in presets():
        raise RefusedError(f"{preset} is a baseline, written by make_baselines.py and not by a run")
    raise RefusedError(f"there is no preset {preset!r}; the names are {', '.join(NAMES)}")


def check_run(export: Path, run: dict[str, Any]) -> None:
    """Raises RefusedError for a trial, a run that nobody measured, and weights whose licence is not known."""
    starts = run.get("starts") or [{}]
    place = export.resolve().parent if export.name == "export" else export.resolve()
    for name in (place.name, Path(str(starts[-1].get("config", {}).get("out", ""))).name):
        if "debug" in name.lower():
            raise RefusedError(f"{export} is of a debug run ({name}): publish a run under another name")
    if (steps := run.get("steps", 0)) < SHORTEST:
        raise RefusedError(f"{export} was trained for {steps} steps, a preset needs at least {SHORTEST:,}")
    if not run.get("val") and not (export / "quality.json").is_file():
        raise RefusedError(f"{export} was never evaluated: run.json has no val, and there is no quality.json")
    if (licence := header_of((export / "README.md").read_text()).get("license", "unknown")) == "unknown":
        raise RefusedError(
            f"the licence in the card of {export} is {licence}: find that of its initial weights and write it there"
        )


def check_weights(export: Path, preset: str, wanted: Wanted) -> FastDecoder:
    """Loads strictly. Raises RefusedError for another family, latent space or size, and for weights that are not finite float16."""
    config = json.loads((export / "config.json").read_text())
    facts = {"_class_name": wanted.class_name, "latent_space": wanted.latent_space, **wanted.config}
    wrong = [
        f"{key.strip('_')} {config.get(key)!r} instead of {value!r}" for key, value in facts.items() if config.get(key) != value
    ]
    if wrong:
        raise RefusedError(f"{export} does not fit the name {preset}: it has {', '.join(wrong)}")
    try:
        decoder = FastDecoder.from_pretrained(export, torch_dtype=torch.float16)
    except (ValueError, OSError) as error:
        raise RefusedError(f"{export} cannot be loaded: {error}") from error
    for key, value in load_file(export / WEIGHTS).items():
        if value.is_floating_point() and value.dtype != torch.float16:
            raise RefusedError(f"{key} in {export} is {value.dtype}: presets are in float16, which write_export makes")
        if not torch.isfinite(value).all():
            raise RefusedError(f"{key} in {export} is not finite")
    return decoder


def rename(card: str, export: Path, preset: str) -> str:
    """The card under its new name: the title, and what the snippets load."""
    card = re.sub(r"^# .*$", f"# {preset}", card, count=1, flags=re.MULTILINE)
    card = re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{preset}"', card)
    return re.sub(r'swap_decoder\(pipe, "[^"]*"', f'swap_decoder(pipe, "{preset}"', card)


def publish(folder: Path, preset: str, *, force: bool = False) -> Path:
    """Copies the export of `folder` to hub_cards/<preset> and returns that.

    Raises:
        RefusedError: see the module; nothing was changed then.
    """
    wanted = check_name(preset)
    export, target = find_export(folder), CARDS / preset
    if export.resolve() == target.resolve():
        raise RefusedError(f"{export} is the preset itself")
    check_run(export, json.loads((export / "run.json").read_text()))
    check_weights(export, preset, wanted)
    if target.exists() and not force:
        raise RefusedError(f"{target} is already there; pass --force to replace it")
    with whole_folder(target) as temporary:
        for name in KEPT:
            if (export / name).is_file():
                shutil.copyfile(export / name, temporary / name)
        config = {key: value for key, value in json.loads((export / "config.json").read_text()).items() if key != "_name_or_path"}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # where it was loaded from is nobody's affair
        (temporary / "README.md").write_text(rename((export / "README.md").read_text(), export, preset))
    return target


def preset_line(preset: str) -> str | None:
    """The line that presets.py lacks, or has otherwise, for the weights in hub_cards/<preset>; None where it is right."""
    config = json.loads((CARDS / preset / "config.json").read_text())
    keys = (
        "width",
        "widths",
        "blocks",
        "convs",
        "block",
        "memory",
        "attention_blocks",
        "residual_blocks",
        "upsampling",
        "mid_block",
        "paper_exact",
        "published",
    )
    shape = {key: tuple(config[key]) if isinstance(config[key], list) else config[key] for key in keys if key in config}
    licence = header_of((CARDS / preset / "README.md").read_text())["license"]
    licence = {"mit": "MIT", "apache-2.0": "Apache-2.0"}.get(licence, licence)
    has = presets().get(preset)
    if has and (has.class_name, has.licence) == (config["_class_name"], licence) and has.config.items() <= shape.items():
        return None
    return f'Preset("{preset}", "{config["_class_name"]}", "{config["latent_space"]}", "{licence}", {shape})'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run, or of its export")
    parser.add_argument("preset", help=", ".join(NAMES))
    parser.add_argument("--force", action="store_true", help="replace what is in hub_cards/<preset>")
    arguments = parser.parse_args()
    try:
        target = publish(arguments.folder, arguments.preset, force=arguments.force)
    except (RefusedError, OSError, json.JSONDecodeError) as error:
        print(f"not published: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{arguments.folder} is now {target}: {', '.join(sorted(p.name for p in target.iterdir()))}, {size / 1e6:.1f} MB")
    if line := preset_line(arguments.preset):
        print(f"presets.py needs this line: {line}")
    if not (target / "quality.json").exists():
        print("measure it next with fld evaluate and fld bench, and let training/results.py write the tables")


if __name__ == "__main__":
    main()
