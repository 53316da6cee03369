"""The trainer at its smallest: pictures, a configuration, encoders, and a run in this process."""

import importlib
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from skimage import data

from fast_latent_decoders import SubpixelDecoder
from fast_latent_decoders.evaluation.encoders import Encoder, FrozenEncoder, StandIn, load_encoder

ROOT = Path(__file__).parent.parent.parent
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "weights").exists(), reason="needs weights and data that do not come with the repository")
SPACE = {"latent_space": "mine", "latent_channels": 16, "scaling_factor": 0.7, "shift_factor": 0.1}


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def shard(path: Path, count: int = 6, size: int = 96) -> Path:
    """A WebDataset shard of smooth random pictures."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((size + 16 * i, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
            info = tarfile.TarInfo(f"{i:04d}.png")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)
    return path


def of_one_picture(folder: Path) -> str:
    """A configuration of little more than one real picture, for the commands that only take its crops."""
    (folder / "pictures").mkdir()
    Image.fromarray(data.astronaut()).save(folder / "pictures" / "astronaut.png")
    path, pictures = folder / "run.yaml", f"[{{path: {folder / 'pictures'}}}]"
    path.write_text(f"decoder: {{_class_name: SubpixelDecoder}}\nout: {folder / 'run'}\nworkers: 0\ndata: {pictures}\nval: {pictures}\n")
    return str(path)


def frozen(stand_in: dict[str, Any] | None = None, path: str | None = None, **decoder: Any) -> FrozenEncoder:
    """The encoder that a configuration gives, for SDXL latents or as `decoder` says."""
    model = SubpixelDecoder(widths=[8, 8, 8], blocks=[1, 1, 1], convs=1, **decoder)
    return load_encoder(Encoder(path=path), StandIn(**(stand_in or {})), model)


def config(folder: Path, name: str) -> str:
    tar = str(shard(folder / "pictures.tar"))
    values = {
        "decoder": {"_class_name": "SubpixelDecoder", "widths": [16, 8, 8], "blocks": [1, 1, 1], "convs": 1},
        "out": str(folder / name), "data": [{"path": tar}], "val": [{"path": tar}], "val_count": 1, "val_every": 100, "steps": 20,
        "warmup": 2, "stages": [{"crop": 32, "batch": 8, "jpeg": 0.3}, {"start": 0.5, "crop": 64, "batch": 4}], "shard": 4, "workers": 0,
        "stand_in": {"redraw": True, "noise": 0.03}, "losses": {"l1": 1}, "save_every": 5, "lr": 1e-3,
        "gan": {"weight": 0.1, "start": 6, "memory": 8},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, precision: str = "no") -> None:
    """The trainer in this process, in float32 unless told otherwise."""
    monkeypatch.setattr(module("train"), "mixed_precision", lambda *_: precision)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", *arguments])
    module("train").main()


def tiny_vae(folder: Path, channels: int) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[8] * 4,
        latent_channels=channels, norm_num_groups=4, scaling_factor=0.7, shift_factor=0.1,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return vae


def call(name: str, *arguments: object) -> int:
    """Exit code of a command of training/."""
    old, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
    try:
        module(name).main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = old
    return 0


def write_log(run: Path, lines: list[Any], torn: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return run
