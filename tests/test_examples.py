"""The scripts of examples/ run as they stand, on tiny random pipelines."""

import runpy
import shlex
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fast_latent_decoders.cli import app
from fast_latent_decoders.clips import read_clip
from fast_latent_decoders.evaluation import subjects

from .pipelines import tiny

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
Run = Callable[..., str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.sdxl().save_pretrained(folder / "sdxl")
    tiny.svd(image_size=224).save_pretrained(folder / "svd")
    tiny.decoder("subpixel", "sdxl").save_pretrained(folder / "decoder")
    tiny.picture().save(folder / "photo.png")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script in an empty folder, `tmp_path`, and gives what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def small(models: Path, steps: int = 2) -> list[str]:
    return ["--model", str(models / "sdxl"), "--decoder", str(models / "decoder"), "--steps", str(steps), "--size", "64"]


def test_sdxl(run: Run, models: Path, tmp_path: Path) -> None:
    run("examples/sdxl.py", *small(models))
    assert (tmp_path / "sdxl.png").exists()


def test_image_to_image(run: Run, models: Path, tmp_path: Path) -> None:
    run("examples/image_to_image.py", str(models / "photo.png"), *small(models, steps=4))
    assert (tmp_path / "image_to_image.png").exists()


def test_svd(run: Run, models: Path, tmp_path: Path) -> None:
    size = ["--width", "64", "--height", "64", "--frames", "2", "--steps", "1"]
    run("examples/svd.py", str(models / "photo.png"), "--model", str(models / "svd"), *size)
    frames, fps = read_clip(tmp_path / "svd.mp4")
    assert (len(list(frames)), fps) == (2, 7)


def test_swap_by_hand(run: Run, models: Path, tmp_path: Path) -> None:
    run("examples/swap_by_hand.py", *small(models))
    assert {path.name for path in tmp_path.iterdir()} == {"swapped-original.png", "swapped-fast.png"}


def test_paper_tables(run: Run, tmp_path: Path) -> None:
    """Each table's commands; the first one's evaluation is run as printed."""
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        tiny.picture(i).resize((256, 256)).save(tmp_path / "pictures" / f"{i}.png")
    lines = []
    for table in ("1", "2", "3"):
        said = run("training/paper_tables.py", table, "pictures", "--tiny", "--dry-run", "--count", "2", "--names", "testlist01.txt")
        lines += [line for line in said.splitlines() if line.startswith("fld ")]
    assert [line.split()[1] for line in lines] == ["evaluate", "bench"] * 3
    assert "--clips" in lines[4] and "--frames 8" in lines[5] and "--size 1024" in lines[2]
    done = CliRunner().invoke(app, [*shlex.split(lines[0].replace("pictures", str(tmp_path / "pictures")).replace(" --names testlist01.txt", ""))[1:], "--features", "alexnet-st", "--out", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report" / "report.html").exists()
    for line in lines[1::2]:  # what fld bench is asked for it knows
        assert set(takewhile(lambda word: not word.startswith("--"), shlex.split(line)[2:])) <= set(subjects.names())


def test_push_to_hub_local(run: Run, models: Path, tmp_path: Path) -> None:
    said = run("examples/push_to_hub.py", str(models / "decoder"), "mine", "--local")
    assert "FastDecoder.from_pretrained('mine')" in said
    assert (tmp_path / "mine" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
