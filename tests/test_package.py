"""The package as it is installed: the wheel by itself, away from the checkout, without torchvision and without a network."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a machine without torchvision looks like: it cannot be found, by import or by those who only ask whether it is there.
HIDE = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def without_torchvision(name, path=None, target=None):
    return None if name.split(".")[0] == "torchvision" else find_spec(name, path, target)


PathFinder.find_spec = staticmethod(without_torchvision)  # dill, where it is installed, calls it on an instance
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_carries_the_default_preset_and_the_encoders_within_40_mb(wheel: Path) -> None:
    assert wheel.stat().st_size <= 40e6
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[2] for name in names if name.startswith("fast_latent_decoders/hub_cards/")}
    assert folders == {"subpixel-sdxl", "subpixel-small-sdxl", "subpixel-sd", "subpixel-temporal-svd", "taesdxl-encoder", "taesd-encoder"}
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fast_latent_decoders", next(top for top in tops if top.endswith(".dist-info"))}


@pytest.mark.slow
def test_the_wheel_decodes_without_torchvision(wheel: Path, tmp_path: Path) -> None:
    """The first of the README's two commands, as far as it is ours."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "site/sitecustomize.py").write_text(HIDE)
    latents = tmp_path / "latents"
    latents.mkdir()
    (latents / "cat.safetensors").write_bytes((ROOT / "examples/latents/cat.safetensors").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "None" in run("-c", "import importlib.util; print(importlib.util.find_spec('torchvision'))")
    assert str(tmp_path) in run("-c", "import fast_latent_decoders; print(fast_latent_decoders.__file__)")
    decode = ("-c", "from fast_latent_decoders.cli import app; app()", "decode", "latents", "--out", "out")
    assert "out" in run(*decode)
    assert (tmp_path / "out/cat.png").exists()
    run(*decode)  # again: what is done is left alone


@pytest.mark.slow
def test_pipelines_import_without_torchvision(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    code = "from diffusers import StableDiffusionXLPipeline, StableVideoDiffusionPipeline; import fast_latent_decoders as f; f.swap_decoder"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
