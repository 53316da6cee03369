"""The trainer: its data, the stand-in encoder's cures, and a run that is stopped and goes on."""

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from fast_latent_decoders import FastDecoder, SubpixelDecoder
from fast_latent_decoders.evaluation.encoders import Encoder, FrozenEncoder, StandIn, load_encoder

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
    for path in (ROOT / "training").glob("*.py"):
        sys.modules.pop(path.stem, None)


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


def frozen(stand_in: dict[str, Any] | None = None, path: str | None = None, **decoder: Any) -> FrozenEncoder:
    """The encoder that a configuration gives, for SDXL latents or as `decoder` says."""
    model = SubpixelDecoder(widths=[8, 8, 8], blocks=[1, 1, 1], convs=1, **decoder)
    return load_encoder(Encoder(path=path), StandIn(**(stand_in or {})), model)


def test_redrawn_weights_stay_in_the_rounding_box() -> None:
    encoder = frozen()
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
    encoder = frozen({"colours": str(tmp_path / "colours.safetensors")})
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
    encoder = frozen({"colour_table": str(weights), "colours": str(real)})
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


def train(*arguments: str, launch: Sequence[str] = (), kill_at: int = -1) -> subprocess.CompletedProcess[str]:
    """Run the trainer in a process of its own, which kills itself in step `kill_at`."""
    script = """
import os, signal, sys
sys.path.insert(0, os.environ["TRAINING"])
import train
train.mixed_precision = lambda *_: "no"  # timing decides between number formats; two runs must not decide differently
rate = train.learning_rate
def learning_rate(c, step, begun=0):
    if step == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(c, step, begun)
train.learning_rate = learning_rate
train.main()
"""
    environment = {"PYTHONPATH": str(ROOT), "TRAINING": str(ROOT / "training"), "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at)}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        command = [sys.executable, *launch, file.name, "--config", *arguments]
        return subprocess.run(command, env={**os.environ, **environment}, check=False, capture_output=True, text=True)


def assert_same(a: Any, b: Any, place: str = "checkpoint") -> None:
    """Every tensor and number in two nested structures is equal, bit for bit."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{place}.{i}")
    else:
        assert a == b, place


@pytest.fixture(autouse=True)
def _accelerate_begins_anew() -> Iterator[None]:
    """A run's number format would stay for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, precision: str = "no") -> None:
    """The trainer in this process, in float32 unless told otherwise."""
    monkeypatch.setattr(module("train"), "mixed_precision", lambda *_: precision)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", *arguments])
    module("train").main()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes of `train` have: sums over threads differ in their last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_killed_at_step_13_goes_on_from_10_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(tmp_path, "whole"), monkeypatch=monkeypatch)
    whole = torch.load(tmp_path / "whole/checkpoint.pt", weights_only=True)
    assert whole["adversary"]["memories"][0][0], "the discriminator's memory is part of the checkpoint"
    for workers in (0, 2):
        name = f"killed-{workers}"
        killed = train(config(tmp_path, name), f"workers={workers}", kill_at=13)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["step"] == 10
        run(config(tmp_path, name), f"workers={workers}", monkeypatch=monkeypatch)
        assert_same(whole, torch.load(tmp_path / name / "checkpoint.pt", weights_only=True))
        told = json.loads((tmp_path / name / "export/run.json").read_text())
        assert (told["steps"], [start["step"] for start in told["starts"]]) == (20, [0, 10])
        assert told["val"]["psnr"] > 5
        FastDecoder.from_pretrained(tmp_path / name / "export")


def test_muon_takes_the_inner_convolutions(tmp_path: Path) -> None:
    """In place, without moving the weights; AdamW has all the rest."""
    c = module("config").read_config(config(tmp_path, "x"), ["optimizer=muon", "lr=0.01"])
    network = module("config").build_decoder(c).decoder.to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in network.named_parameters()}
    places = {name: value.data_ptr() for name, value in network.named_parameters()}
    muon, adamw = module("optimizers").build_optimizers(network, c)
    assert len(muon.matrices) + sum(len(group["params"]) for group in adamw.param_groups) == len(before)
    inner = {id(weight) for weight in muon.weights}
    first, *_, last = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert inner and not inner & {id(first), id(last)}
    network(torch.randn(2, 4, 4, 4)).square().mean().backward()
    muon.step()
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in network.named_parameters() if id(value) in inner}
    weight, name = muon.weights[0], next(name for name, value in network.named_parameters() if value is muon.weights[0])
    step = module("optimizers").matrix(before[name] - weight.detach()) / (0.01 * 0.2 * max(weight.shape[0], weight[0].numel()) ** 0.5)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.5 and values.max() < 1.5, "a step is orthogonal, at a length of AdamW's"
    adamw.step()
    assert not any(torch.equal(value, before[name]) for name, value in network.named_parameters() if value.grad.abs().max() > 0)
    assert {name: value.data_ptr() for name, value in network.named_parameters()} == places


def test_a_run_under_autocast_exports_what_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export is compared with the network, which must be out of autocast's wrapping by then."""
    run(config(tmp_path, "half"), "steps=2", "save_every=2", "gan.weight=0", monkeypatch=monkeypatch, precision="bf16")
    assert json.loads((tmp_path / "half/export/run.json").read_text())["starts"][0]["precision"] == "bf16"


@pytest.mark.usefixtures("one_thread")
def test_muon_resumes_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(tmp_path, "whole"), "optimizer=muon", "gan.weight=0", monkeypatch=monkeypatch)
    killed = train(config(tmp_path, "parts"), "optimizer=muon", "gan.weight=0", kill_at=13)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run(config(tmp_path, "parts"), "optimizer=muon", "gan.weight=0", monkeypatch=monkeypatch)
    assert_same(*(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")))


def test_variants_of_the_search_decode_and_cost_alike() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    search = module("search")
    z = torch.randn(1, 4, 8, 8)
    for name, changes in search.VARIANTS.items():
        decoder = search.VariantDecoder(**{key: value for key, value in changes.items() if key != "train"})
        with FlopCounterMode(display=False) as flops:
            assert decoder.decode(z).sample.shape == (1, 3, 64, 64)
        assert 130e3 < flops.get_total_flops() / 2 / 64**2 < 180e3, name
    FastDecoder.families.pop("VariantDecoder")


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGTERM, then by Ctrl-C, both of which its workers get too; the same command goes on each time."""
    path = config(tmp_path, "run")
    changes = ["steps=100000", "save_every=1000", "gan.weight=0", "workers=2"]
    command = [sys.executable, str(ROOT / "training/train.py"), "--config", path, *changes]
    log, at = tmp_path / "run/log.jsonl", [0]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        while not log.exists() or log.read_text().count('"samples"') < len(at):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=120)[0]
        assert (told := re.search(r"stopped at step (\d+) of 100000; the same command goes on", said)), said
        at.append(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"])
        assert at[-1] == int(told[1])
    run(path, *changes[1:], f"steps={at[-1] + 2}", monkeypatch=monkeypatch)
    told = json.loads((tmp_path / "run/export/run.json").read_text())
    assert [start["step"] for start in told["starts"]] == at
    assert told["steps"] == at[-1] + 2


def test_workers_are_deaf_from_birth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to end in the very moment in which they begin, they go on; the trainer alone decides (it was a crash, seldom)."""
    latents, data, config_module = module("latents"), module("data"), module("config")
    c = config_module.read_config(config(tmp_path, "x"), ["workers=2"])
    sources = {"pictures": data.Sources(c.data, "pictures", 0)}
    shards = latents.Shards(c, sources, None, Accelerator(cpu=True))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda _: time.sleep(0.3))  # what a worker does first of all: made slow
        batches = shards._crops(0, "pictures", 0)
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert sum(len(batch.target) for batch in batches) == shards.count(c.stages[0], "pictures")
    for ending in (signal.SIGINT, signal.SIGTERM):
        assert ending not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.slow
def test_two_processes_train_one_decoder_and_resume(tmp_path: Path) -> None:
    """Their gradients are averaged, so that both hold the same weights; one of them writes, each has its own memory of fakes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    whole = train(config(tmp_path, "whole"), launch=launch)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("finished") == 1
    run = json.loads((tmp_path / "whole/export/run.json").read_text())
    assert (run["steps"], run["starts"][0]["processes"]) == (20, 2)
    assert train(config(tmp_path, "killed"), launch=launch, kill_at=13).returncode != 0
    resumed = train(config(tmp_path, "killed"), launch=launch)
    assert resumed.returncode == 0, resumed.stderr
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    first, second = a["adversary"]["memories"]
    assert not torch.equal(torch.stack(first[1]), torch.stack(second[1]))
    assert_same(a, b)


def test_a_folder_that_is_too_full_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = module("running")
    monkeypatch.setattr(running.shutil, "disk_usage", lambda _: running.shutil._ntuple_diskusage(1, 1, 1000))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", config(tmp_path, "x")])
    with pytest.raises(SystemExit, match=r"0 MB free and checkpoints need \d+ MB"):
        module("train").main()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be written to"):
        running.make_room(tmp_path / "file" / "run", 1)


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
        ("losses.tempral=1", "did you mean temporal?"),
        ("stages.0.crops=64", "unknown key 'crops' in .*did you mean crop?"),
        ("stages.0.crop=60", "crops must be multiples of 8 px"),
        ("stages=[{start: 0.5}]", "stages must begin at start 0"),
        ("stages.0.clips=0.5", "train on clips.*no source under data has kind: clips"),
        ("data.3.path=x", "there is no 3"),
        ("gan.normalised=true", "give gan.adaptive=false with it"),
    ],
)
def test_wrong_keys_and_values_are_named(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        module("config").read_config(config(tmp_path, "x"), [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("decoder._class_name=SubpixelDecodr", "unknown class 'SubpixelDecodr' in decoder._class_name: did you mean SubpixelDecoder?"),
        ("decoder.width=3", "decoder: .*unexpected keyword argument 'width'"),
        ("init=subpixel-sdx", "there is no preset or folder called 'subpixel-sdx'; did you mean subpixel-sdxl"),
        ("data.0.path=nowhere/*.tar", r"nowhere/\*\.tar matches no file or folder"),
        ("data.0.min_size=5000", "1000 smaller than 5000 px"),
        ("faces.detector=nowhere.onnx", "there is no face detector at nowhere.onnx"),
        ("losses={squeeze: 1}", "the term squeeze needs squeezenet=PATH"),
        ("trackers=[paper]", "Unsupported logging capability: paper"),
        ("teacher={path: taesd, output: 1}", "the teacher taesd"),
    ],
)
def test_what_cannot_be_had_is_one_sentence_at_the_start(
    change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(config(tmp_path, "x"), change, monkeypatch=monkeypatch)


def test_changes_reach_inside_and_the_config_is_frozen(tmp_path: Path) -> None:
    c = module("config").read_config(config(tmp_path, "x"), ["stand_in.noise=0.5", "lr=2e-4", "losses.mse=3"])
    assert (c.stand_in.noise, c.lr, c.losses) == (0.5, 2e-4, {"l1": 1.0, "mse": 3.0})
    with pytest.raises(AttributeError):
        c.steps = 3


def test_every_config_of_the_repository_is_valid() -> None:
    paths = list((ROOT / "training/configs").rglob("*.yaml"))
    assert len(paths) > 10
    for path in paths:
        c = module("config").read_config(str(path), [])
        FastDecoder.families[c.decoder["_class_name"]].from_config(c.decoder)


def test_a_config_lies_over_its_base(tmp_path: Path) -> None:
    base = config(tmp_path, "base")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nlosses: {mse: 1}\ngan: {weight: 0}\n")
    c = module("config").read_config(str(tmp_path / "mine.yaml"), [])
    assert (c.losses, c.gan.weight, c.gan.start, c.out) == ({"mse": 1.0}, 0, 6, str(tmp_path / "base"))
    assert base


def test_pixel_terms_have_hand_computed_values() -> None:
    """A constant error of 0.3; its spectrum is one coefficient, 0.3 * sqrt(H W), among H * (W / 2 + 1)."""
    losses = module("losses")
    x = torch.rand(2, 3, 64, 64) - 0.5
    expected = {
        "l1": 0.3, "mse": 0.09, "charbonnier": (0.09 + 1e-6) ** 0.5 - 1e-3, "frequency": 0.3 * 64 / (64 * 33), "colour": 0.3, "detail": 0,
        "lattice": 0,
    }  # fmt: skip
    terms = {**losses.WEIGHTED, **losses.PLAIN}
    assert terms.keys() == {*expected, "ms_ssim"}
    for name, value in expected.items():
        assert terms[name](x + 0.3, x).item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)) % 2 - 0.5
    assert terms["colour"](x + checkerboard, x).item() == pytest.approx(0, abs=1e-6)
    # It is all diagonal band at full resolution, one of six, with an amplitude of 0.5, and gone at half resolution.
    # Too much counts 0.3 of 0.5, too little 0.7 of 0.5.
    assert terms["detail"](0 * x + checkerboard, 0 * x).item() == pytest.approx(0.6 * (0.25 + 1e-6) ** 0.5 / 6, abs=1e-3)
    assert terms["detail"](0 * x, 0 * x + checkerboard).item() == pytest.approx(1.4 * (0.25 + 1e-6) ** 0.5 / 6, abs=1e-3)
    assert terms["detail"](x.roll(1, -1), x) < 0.2 * terms["detail"](0 * x, x)  # elsewhere is as good
    assert terms["lattice"](x + checkerboard, x).item() == pytest.approx(0.5, rel=0.01)
    dots = torch.zeros(64, 64)
    dots[3::8, 5::8] = 0.8  # one of a latent's 64 pixels, in every window of 64 px: 0.8 * sqrt(1 / 64 - 1 / 64**2)
    assert terms["lattice"](x + dots, x).item() > 0.99 / 2 * 0.0992
    for size in (16, 64, 128, 192):
        y = torch.rand(1, 3, size, size) * 2 - 1
        assert terms["ms_ssim"](y, y).item() == pytest.approx(0, abs=1e-5)
        assert terms["ms_ssim"](y, torch.rand_like(y)).item() > 0.1


def test_faces_count_more_in_pixel_terms() -> None:
    """An error of 1 in a quarter of the pixels, which count threefold: 3 / (3 + 3); equal weights change nothing."""
    error, weight = torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
    error[..., :4, :4] = 1
    weight[..., :4, :4] = 3
    for name, term in module("losses").WEIGHTED.items():
        plain = term(error, torch.zeros_like(error)).item()
        assert plain == pytest.approx(0.25, abs=1e-3), name
        assert term(error, torch.zeros_like(error), torch.full_like(weight, 5)).item() == pytest.approx(plain), name
        assert term(error, torch.zeros_like(error), weight).item() == pytest.approx(0.5, abs=1e-3), name


def test_the_temporal_term_has_a_hand_computed_value() -> None:
    """Two clips of three frames. A constant error costs nothing; one frame off by 0.6 is two wrong changes of 0.6 among two."""
    temporal = module("losses").temporal
    target = torch.rand(6, 3, 8, 8)
    decoded = target + 0.5
    assert temporal(decoded, target, 3).item() == pytest.approx(0, abs=1e-6)
    decoded[1] += 0.6
    assert temporal(decoded, target, 3).item() == pytest.approx(0.6 * 2 / 4, rel=1e-4)
    assert temporal(decoded, target, 1).item() == 0


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
    adversary = module("adversary").Adversary(module("config").Gan(lr=1e-3, memory=6), 4, Accelerator(), width=8)
    z, target = torch.randn(4, 4, 4, 4), torch.rand(4, 3, 32, 32) * 2 - 1
    decoded = (target * 0.3).requires_grad_()
    losses = [adversary.learn(decoded, target, z, step) for step in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    assert decoded.grad is None
    assert len(adversary.pictures) == 6
    adversary.loss(decoded, target, z).backward()
    assert decoded.grad is not None
    assert all(parameter.grad is None or not parameter.requires_grad for parameter in adversary.network.parameters())


def test_normalised_gradients_have_one_length_whatever_the_discriminator_says() -> None:
    """Each picture's gradient has the root mean square that L1's has, times the weight."""
    picture = torch.rand(3, 3, 16, 16, requires_grad=True)
    passed = module("adversary").of_one_length(picture, weight=0.5)
    (passed.flatten(1).square().sum(1) * torch.tensor([1.0, 1e-3, 1e3])).sum().backward()
    assert picture.grad is not None
    sizes = picture.grad.flatten(1).square().mean(1).sqrt()
    assert torch.allclose(sizes, torch.full((3,), 0.5 / picture.numel()), rtol=1e-4)


def lesson(student: FastDecoder, **settings: Any) -> Any:
    teacher = module("config").Teacher(path="taesdxl", output=1, **settings)
    return module("teacher").Lesson(teacher, student.latent_space, student.decoder, torch.device("cpu"))


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = FastDecoder.from_pretrained("taesdxl").float()
    found = lesson(student, features=1, latents=["real", "noisy", "mixed", "recoloured"])
    z = torch.randn(4, 4, 8, 8)
    for step in range(4):
        taught = found.latents(z, 1, step, seed=step)
        assert taught.shape == (1 if step else 0, 4, 8, 8), "real ones are decoded with the batch already"
        assert not any(torch.equal(row, other) for row in taught for other in z)
        decoded, imitated = student.decoder(torch.cat([z, taught])).split([len(z), len(taught)])
        terms = found.terms(imitated, taught, 1, decoded, z)
        assert terms.keys() == {"teacher", "teacher_maps"}
        assert max(term.item() for term in terms.values()) < 1e-6
    clips = found.latents(torch.randn(6, 4, 8, 8), 3, 1, seed=0)
    assert clips.shape == (3, 4, 8, 8), "whole clips"


def test_a_teacher_of_structure_is_not_followed_in_colour() -> None:
    student = FastDecoder.from_pretrained("taesdxl").float()
    z = torch.randn(2, 4, 8, 8)
    tinted = student.decoder(z) + 0.3
    assert lesson(student).terms(tinted, z, 1, tinted, z)["teacher"].item() == pytest.approx(0.3, rel=1e-3)
    assert lesson(student, structure=True).terms(tinted, z, 1, tinted, z)["teacher"].item() == pytest.approx(0, abs=1e-5)


def test_attention_maps_tell_networks_of_other_widths_apart() -> None:
    student = SubpixelDecoder(widths=[16, 8, 8], blocks=[1, 1, 1], convs=1)
    found = lesson(student, features=1)
    z = torch.randn(2, 4, 8, 8)
    term = found.terms(student.decoder(z), z, 1, z, z)["teacher_maps"]
    assert 0 < term.item() < 2
    term.backward()
    assert all(parameter.grad is not None for parameter in student.decoder.layers[0].parameters())


def tiny_vae(folder: Path, channels: int) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[8] * 4,
        latent_channels=channels, norm_num_groups=4, scaling_factor=0.7, shift_factor=0.1,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return vae


SPACE = {"latent_space": "mine", "latent_channels": 16, "scaling_factor": 0.7, "shift_factor": 0.1}


def test_a_real_vae_gives_scaled_latents_of_its_posterior(tmp_path: Path) -> None:
    vae = tiny_vae(tmp_path / "vae", 16).eval()
    encoder = frozen(path=str(tmp_path / "vae"), **SPACE)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    assert torch.allclose(encoder.encode(x), (posterior.mode() - 0.1) * 0.7, atol=1e-5)
    draws = [encoder.encode(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2], atol=1e-3)
    with pytest.raises(ValueError, match=r"is a real VAE, and stand_in\.redraw"):
        frozen({"redraw": True}, path=str(tmp_path / "vae"), **SPACE)
    with pytest.raises(ValueError, match="another latent space"):
        frozen(path=str(tmp_path / "vae"))
    with pytest.raises(ValueError, match="no VAE that diffusers can load"):
        frozen(path=str(tmp_path))
    with pytest.raises(ValueError, match="no tiny encoder for the latent space 'mine'"):
        frozen(**SPACE)


@needs_shared
def test_a_tiny_encoder_of_sixteen_channels_from_its_file() -> None:
    path = str(SHARED / "weights/taesd3_encoder.safetensors")
    encoder = frozen({"redraw": True}, path=path, **SPACE)
    assert encoder.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)
    with pytest.raises(ValueError, match="16 channels, and the decoder takes 4"):
        frozen(path=path)
    with pytest.raises(ValueError, match="holds no encoder"):
        frozen(path=str(SHARED / "weights/taesd3_decoder.safetensors"), **SPACE)


def test_latents_of_sixteen_channels_from_a_real_vae_with_every_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vae(tmp_path / "vae", 16)
    decoder = json.dumps({"_class_name": "SubpixelDecoder", "widths": [16, 8, 8], "blocks": [1, 1, 1], "convs": 1, **SPACE})
    terms = "{l1: 1, mse: 1, charbonnier: 1, frequency: 1, ms_ssim: 1, colour: 1, stlpips: 1, reencode: 1}"
    changes = [f"encoder.path={tmp_path / 'vae'}", "stand_in.redraw=false", f"decoder={decoder}", f"losses={terms}", "steps=4"]
    run(config(tmp_path, "run"), *changes, "gan.start=1", "branches=true", "trackers=[tensorboard]", monkeypatch=monkeypatch)
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    steps = [entry for entry in logged if "norm" in entry]
    assert {"l1", "reencode", "gan", "discriminator", "waiting", "crops_per_s", "lr"} <= steps[-1].keys()
    assert list((tmp_path / "run/pictures").glob("*.png"))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    exported = FastDecoder.from_pretrained(tmp_path / "run/export")
    assert exported.config.latent_channels == 16
    assert exported.decode(torch.randn(1, 16, 4, 4)).sample.shape == (1, 3, 32, 32)


def test_two_small_batches_are_one_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ["gan.weight=0", "stand_in.noise=0", "steps=3", "ema=0"]
    run(config(tmp_path, "large"), *plain, "stages=[{crop: 32, batch: 4}]", monkeypatch=monkeypatch)
    run(config(tmp_path, "small"), *plain, "stages=[{crop: 32, batch: 2}]", "accumulate=2", monkeypatch=monkeypatch)
    large, small = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"] for name in ("large", "small"))
    for key, value in large.items():
        assert torch.allclose(value, small[key], atol=1e-5), key


def test_a_run_goes_on_where_only_its_export_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(tmp_path, "first"), "steps=4", monkeypatch=monkeypatch)
    run(config(tmp_path, "second"), "steps=6", f"warm_start={tmp_path / 'first/export'}", monkeypatch=monkeypatch)
    told = json.loads((tmp_path / "second/export/run.json").read_text())
    assert (told["starts"][0]["step"], told["steps"]) == (4, 6)
    with pytest.raises(SystemExit, match="another shape"):
        run(config(tmp_path, "x"), "decoder.widths=[8, 8, 8]", f"warm_start={tmp_path / 'first/export'}", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match=r"no run\.json"):
        run(config(tmp_path, "y"), f"warm_start={ROOT / 'hub_cards/taesdxl'}", monkeypatch=monkeypatch)


def test_a_run_begins_as_what_it_grew_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step with no learning rate: the export is TAESDXL's function at a greater width."""
    decoder = "decoder={_class_name: TAEDecoder, width: 72}"
    run(config(tmp_path, "run"), decoder, "init=taesdxl", "lr=0", "steps=1", "gan.weight=0", monkeypatch=monkeypatch)
    z = torch.randn(1, 4, 8, 8) / 0.13025
    grown, source = (FastDecoder.from_pretrained(name).float().decode(z).sample for name in (tmp_path / "run/export", "taesdxl"))
    assert torch.allclose(grown, source, atol=5e-3)  # weights are stored in float16


def test_cached_latents_are_those_of_a_run_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a cache of another encoder or with other conventions is refused, each difference named."""
    latents, path, cache = module("latents"), config(tmp_path, "plain"), tmp_path / "cache"
    run(path, "steps=6", monkeypatch=monkeypatch)
    for _ in range(2):  # the second call makes nothing
        monkeypatch.setattr(sys, "argv", ["latents.py", "--config", path, "--out", str(cache), "--count", "2"])
        latents.main()
    assert len(list(cache.rglob("*.safetensors"))) == 4
    run(config(tmp_path, "cached"), "steps=6", f"cache={cache}", monkeypatch=monkeypatch)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"] for name in ("plain", "cached"))
    assert_same(a, b)
    with pytest.raises(SystemExit, match="redraw was True, is False"):
        run(config(tmp_path, "x"), "stand_in.redraw=false", f"cache={cache}", monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match=r"(weights|encoder) was .*, is "):
        run(config(tmp_path, "y"), "decoder.latent_space=sd", f"cache={cache}", monkeypatch=monkeypatch)


def clip(path: Path, frames: int = 20, size: int = 64) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        for i in range(frames):
            pixels = np.full((size, size, 3), 10 * i, np.uint8)
            pixels[8 : 8 + size // 2, i : i + size // 2] = (200, 30, 90)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.mark.parametrize(
    "decoder",
    [
        "{_class_name: TAETemporalDecoder, width: 32, blocks: [1, 1, 1, 1], latent_space: sd}",
        "{_class_name: SubpixelTemporalDecoder, widths: [16, 8, 8], blocks: [1, 1, 1], memory: [1, 1, 0], latent_space: sd}",
    ],
)
def test_pictures_and_clips_train_a_temporal_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.avi"):
        clip(tmp_path / "clips" / name)
    path = config(tmp_path, "run")
    clips = {"path": str(tmp_path / "clips"), "kind": "clips"}
    changes = [
        f"decoder={decoder}",
        f"val={json.dumps([clips])}",
        "stages=[{crop: 32, batch: 4, clips: 0.5, frames: 8}]", "losses={l1: 1, temporal: 0.5}", "steps=4", "save_every=1",
    ]  # fmt: skip
    pictures = {"path": str(tmp_path / "pictures.tar")}
    run(path, *changes, f"data={json.dumps([pictures, clips])}", "gan.start=2", monkeypatch=monkeypatch)
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert logged[-1]["val"]["temporal"] > 0
    assert any("temporal" in entry for entry in logged if "norm" in entry)
    y = FastDecoder.from_pretrained(tmp_path / "run/export").decode(torch.randn(8, 4, 4, 4), num_frames=8).sample
    assert y.shape == (8, 3, 32, 32)
