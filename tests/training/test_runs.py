"""Runs of the trainer: stopped and gone on with, in several processes, from pictures and from clips."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.presets import PRESETS, Preset

from .tiny import ROOT, SPACE, config, module, run, tiny_vae


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


@pytest.mark.slow
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


def test_muon_resumes_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config(tmp_path, "whole"), "optimizer=muon", "gan.weight=0", monkeypatch=monkeypatch)
    killed = train(config(tmp_path, "parts"), "optimizer=muon", "gan.weight=0", kill_at=13)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run(config(tmp_path, "parts"), "optimizer=muon", "gan.weight=0", monkeypatch=monkeypatch)
    assert_same(*(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")))


def test_variants_of_the_search_decode_and_cost_alike() -> None:
    search = module("search")
    for name in search.VARIANTS:
        assert search.VariantDecoder(**search.arguments_of(name, 0.5)).decode(torch.randn(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
        work = Preset(name, "VariantDecoder", "sdxl", "MIT", search.arguments_of(name)).mac_per_pixel
        assert 79e3 < work < 98e3, name
        assert name != "ships" or work == PRESETS["subpixel-sdxl"].mac_per_pixel
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
