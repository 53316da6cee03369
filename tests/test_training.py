"""The trainer: its data, the stand-in encoder's cures, and a run that is stopped and goes on."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from fast_latent_decoders import SDXL, FastDecoder

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "weights").exists(), reason="needs the colour table, which does not come with the repository")


@pytest.fixture(autouse=True)
def _training_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # a run takes these over
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in ("adversary", "config", "data", "latents", "losses", "validate", "train"):
        sys.modules.pop(name, None)


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


def test_crops_are_of_their_size_and_range(tmp_path: Path) -> None:
    data = module("data")
    pictures = data.load_pictures([shard(tmp_path / "a.tar")])
    assert [tuple(p.shape) for p in pictures[:2]] == [(3, 96, 96), (3, 96, 112)]
    rng = np.random.default_rng(1)
    for _ in range(20):
        crop = data.random_crop(pictures, 32, rng, colour=0.5)
        assert crop.shape == (3, 32, 32)
        assert crop.abs().max() <= 1
    with pytest.raises(ValueError, match="short side of at least 128"):
        data.random_crop(pictures, 128, rng)


def test_bad_shards_are_errors_not_skips(tmp_path: Path) -> None:
    data = module("data")
    with pytest.raises(FileNotFoundError, match="at least one shard"):
        data.load_pictures([])
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        info = tarfile.TarInfo("0001.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"nope"))
    with pytest.raises(ValueError, match="0001"):
        data.load_pictures([tmp_path / "bad.tar"])


def test_redrawn_weights_stay_in_the_rounding_box() -> None:
    encoder = module("latents").StandInEncoder(SDXL)
    encoder.redraw(torch.Generator().manual_seed(0))
    moved = 0
    for key, value in encoder.network.state_dict().items():
        stored = encoder.stored[key]
        if key.endswith("bias"):
            assert torch.equal(value, stored)
            continue
        step = (2.0 ** (stored.abs().clamp_min(1e-9).log2().floor() - 3)).clamp_min(2.0**-9)
        assert ((value - stored).abs() <= step / 2 + 1e-7).all()
        moved += int((value != stored).sum())
    assert moved > 1_000_000
    encoder.redraw(None)
    assert all(torch.equal(value, encoder.stored[key]) for key, value in encoder.network.state_dict().items())


def test_transplanted_colours(tmp_path: Path) -> None:
    """Amplitude 0 is the real colour's latent and a flat target; texture adds what the encoder makes of it."""
    colours = {"srgb": torch.tensor([[0.2, 0.5, 0.9], [0.6, 0.1, 0.3]]), "latent": torch.tensor([[1.0, -2, 0.5, 3], [0.1, 0.2, 0.3, 0.4]])}
    save_file(colours, tmp_path / "colours.safetensors")
    encoder = module("latents").StandInEncoder(SDXL, colours=str(tmp_path / "colours.safetensors"))
    texture = torch.rand(2, 3, 64, 64) - 0.5
    z, target = encoder.transplant(texture, torch.tensor([0.0, 0.2]), torch.tensor([0, 1]))
    assert torch.allclose(z[0], colours["latent"][0][:, None, None].expand(4, 8, 8), atol=1e-5)
    assert torch.allclose(target[0], (colours["srgb"][0] * 2 - 1)[:, None, None].expand(3, 64, 64), atol=1e-6)
    flat = (colours["srgb"][1:] * 2 - 1)[:, :, None, None].expand(1, 3, 64, 64)
    expected = colours["latent"][1:, :, None, None] + encoder.encode(target[1:]) - encoder.encode(flat)
    assert torch.allclose(z[1:], expected, atol=1e-4)


@needs_shared
def test_colour_table_has_its_axes_the_right_way_round() -> None:
    """The check value of the table's description, on other colours: rms of real minus (stand-in + table), per channel;
    with the axes the wrong way round it is .072 .074 .280 .124."""
    weights, real = SHARED / "weights/taesdxl_colour_lut.safetensors", SHARED / "data/real_latents/sdxl/vae_constant_colours.safetensors"
    encoder = module("latents").StandInEncoder(SDXL, str(weights), str(real))
    colours, latents = (encoder.colours[key][::61] for key in ("srgb", "latent"))
    flat = (colours * 2 - 1)[:, :, None, None].expand(-1, -1, 104, 104)
    z = encoder.encode(flat) + encoder.table_at(flat)
    rms = (latents - z[:, :, 6, 6]).square().mean(0).sqrt()
    assert torch.allclose(rms, torch.tensor([0.027, 0.039, 0.094, 0.055]), atol=0.02)


def test_stlpips_rises_with_noise() -> None:
    distance = module("losses").ShiftTolerantLPIPS()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    values = [distance((x + s * torch.randn_like(x)).clamp(-1, 1), x).item() for s in (0.0, 0.1, 0.4)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[0] < values[1] < values[2]


def config(folder: Path, name: str) -> str:
    tar = str(shard(folder / f"{name}.tar"))
    values = {
        "decoder": {"_class_name": "SubpixelDecoder", "widths": [16, 8, 8], "blocks": [1, 1, 1], "convs": 1},
        "out": str(folder / name), "pictures": [tar], "val_pictures": [tar], "val_count": 1, "val_every": 100, "steps": 12,
        "warmup": 2, "crops": [[0.0, 32, 8], [0.5, 64, 4]], "shard": 4, "losses": {"l1": 1}, "save_every": 4, "lr": 1e-3,
        "gan": {"weight": 0.1, "start": 6, "memory": 8},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.slow
def test_a_run_that_was_stopped_equals_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = module("train")
    # Timing decides between number formats; the two runs must not decide differently.
    monkeypatch.setattr(train, "mixed_precision", lambda *_: "no")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", config(tmp_path, "whole")])
    train.main()

    rate = train.learning_rate

    def stop_at_seven(c: object, step: int) -> float:
        if step == 7:
            raise KeyboardInterrupt
        return rate(c, step)

    monkeypatch.setattr(sys, "argv", ["train.py", "--config", config(tmp_path, "stopped")])
    monkeypatch.setattr(train, "learning_rate", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    monkeypatch.setattr(train, "learning_rate", rate)
    train.main()

    whole, stopped = (FastDecoder.from_pretrained(tmp_path / name / "model") for name in ("whole", "stopped"))
    for a, b in zip(whole.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(a, b)
    run = json.loads((tmp_path / "whole/model/run.json").read_text())
    assert run["steps"] == 12
    assert run["val"]["psnr"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_killed_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    """Asked to end it saves where it is; killed it goes on from its last checkpoint. Either way the same command finishes it."""
    command = [sys.executable, str(ROOT / "training/train.py"), "--config", config(tmp_path, "run"), "steps=100000", "save_every=1", "gan.weight=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    checkpoint = tmp_path / "run/checkpoint.pt"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    at = torch.load(checkpoint, weights_only=True)["step"]
    if number != signal.SIGKILL:
        assert f"stopped at step {at} of 100000; the same command goes on" in said
    done = subprocess.run([*command, f"steps={at + 2}"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run/model/run.json").read_text())
    assert [start["step"] for start in run["starts"]] == [0, at]
    assert run["steps"] == at + 2


@pytest.mark.slow
def test_two_processes_train_one_decoder(tmp_path: Path) -> None:
    """Their gradients are averaged, so that both hold the same weights; one of them writes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "training/train.py"), "--config", config(tmp_path, "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 1
    run = json.loads((tmp_path / "run/model/run.json").read_text())
    assert (run["steps"], run["starts"][0]["processes"]) == (12, 2)
    FastDecoder.from_pretrained(tmp_path / "run/model")


def test_a_folder_that_is_too_full_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = module("train")
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: train.shutil._ntuple_diskusage(1, 1, 1000))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", config(tmp_path, "x")])
    with pytest.raises(SystemExit, match=r"0 MB free and checkpoints need \d+ MB"):
        train.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepz=3", "unknown key 'stepz' in .*did you mean steps?"),
        ("gan.adaptiv=false", "unknown key 'adaptiv' in .*did you mean adaptive?"),
        ("losses.charbonier=1", "unknown key .charbonier. in losses: did you mean charbonnier?"),
        ("steps=many", "steps is 'many'.* integer"),
        ("gan.kind=wasserstein", "gan.kind is 'wasserstein'.*'hinge', 'least_squares' or 'relativistic'"),
        ("steps", "expected key=value, got 'steps'"),
        ("steps.more=1", "steps holds no keys"),
        ("crops=[[0.5, 64, 4]]", "crops must begin at share 0"),
    ],
)
def test_wrong_keys_and_values_are_named(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        module("config").read_config(config(tmp_path, "x"), [change])


def test_changes_reach_inside_and_the_config_is_frozen(tmp_path: Path) -> None:
    c = module("config").read_config(config(tmp_path, "x"), ["stand_in.noise=0.5", "lr=2e-4", "losses.mse=3"])
    assert (c.stand_in.noise, c.lr, c.losses) == (0.5, 2e-4, {"l1": 1.0, "mse": 3.0})
    with pytest.raises(AttributeError):
        c.steps = 3


def test_every_config_of_the_repository_is_valid() -> None:
    for path in (ROOT / "training/configs").glob("*.yaml"):
        module("config").read_config(str(path), [])


def test_pixel_terms_have_hand_computed_values() -> None:
    """A constant error of 0.3; its spectrum is one coefficient, 0.3 * sqrt(H W), among H * (W / 2 + 1)."""
    pixel = module("losses").PIXEL
    x = torch.rand(2, 3, 64, 64) - 0.5
    expected = {"l1": 0.3, "mse": 0.09, "charbonnier": (0.09 + 1e-6) ** 0.5 - 1e-3, "frequency": 0.3 * 64 / (64 * 33)}
    for name, value in expected.items():
        assert pixel[name](x + 0.3, x).item() == pytest.approx(value, rel=1e-4), name
    for size in (16, 64, 128, 192):
        y = torch.rand(1, 3, size, size) * 2 - 1
        assert pixel["ms_ssim"](y, y).item() == pytest.approx(0, abs=1e-5)
        assert pixel["ms_ssim"](y, torch.rand_like(y)).item() > 0.1


def test_a_term_without_its_weights_says_which_need_none() -> None:
    with pytest.raises(RuntimeError, match=r"squeezenet=PATH.*stlpips needs no file"):
        module("losses").perceptual("squeeze")


def test_adversarial_terms_have_hand_computed_values() -> None:
    adversary = module("adversary")
    fake, real = torch.tensor([0.5, -2.0]), torch.tensor([2.0, 0.0])
    gap = torch.nn.functional.softplus
    expected = {
        "hinge": (0.75, (0.5 + (1.5 + 0) / 2) / 2),
        "least_squares": ((0.25 + 9) / 2, ((1 + 1) / 2 + (2.25 + 1) / 2) / 2),
        "relativistic": (gap(torch.tensor([1.5, 2.0])).mean().item(), gap(torch.tensor([-1.5, -2.0])).mean().item()),
    }
    for kind, (mine, its) in expected.items():
        assert adversary.decoder_loss(kind, fake, real).item() == pytest.approx(mine)
        assert adversary.discriminator_loss(kind, fake, real).item() == pytest.approx(its)


def test_the_adaptive_ratio_is_that_of_the_gradients() -> None:
    w = torch.nn.Parameter(torch.ones(4))
    ratio = module("adversary").adaptive_ratio((3 * w).sum(), (w / 2).sum(), w)
    assert ratio.item() == pytest.approx(6)
    assert not ratio.requires_grad


def test_a_discriminator_learns_to_tell_and_leaves_the_decoder_alone() -> None:
    torch.manual_seed(0)
    adversary = module("adversary").Adversary(4, "hinge", lr=1e-3, memory=6, accelerator=Accelerator(), width=8)
    z, target = torch.randn(4, 4, 4, 4), torch.rand(4, 3, 32, 32) * 2 - 1
    decoded = (target * 0.3).requires_grad_()
    losses = [adversary.learn(decoded, target, z, step) for step in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    assert decoded.grad is None
    assert len(adversary.pictures) == 6
    adversary.loss(decoded, target, z).backward()
    assert decoded.grad is not None
    assert all(parameter.grad is None or not parameter.requires_grad for parameter in adversary.network.parameters())
