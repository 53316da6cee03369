"""The end of a run: its export and card, and promotion to a preset."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from fast_latent_decoders import EfficientViTDecoder, FastDecoder, SubpixelDecoder, TAEDecoder, TAETemporalDecoder
from fast_latent_decoders.presets import folder

from .tiny import call, module, write_log

SHAPE = {"widths": (16, 8, 8), "blocks": (1, 1, 1), "convs": 1}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_config(out: Path, **more: Any) -> Any:
    """A configuration with something of everything that a card tells."""
    config = module("config")
    sources = [
        config.Source(path="data/train-0*.tar", min_size=256, aesthetic=(5.5, 10), faces=True),
        config.Source(path="hf:someone/pictures:train"),
        config.Source(path="/home/me/videos/*.tar", kind="clips", classes=["Archery"]),
    ]
    values: dict[str, Any] = {
        "decoder": {"_class_name": "SubpixelDecoder", **SHAPE},
        "out": out.as_posix(),
        "data": sources,
        "val": [config.Source(path="data/val-0*.tar")],
        "baseline": "taesdxl",
        "losses": {"l1": 1.0, "stlpips": 0.25, "mse": 0.0},
        "perceptual_share": {"stlpips": 0.25},
        "gan": config.Gan(weight=0.8, start=3000),
        "teacher": config.Teacher(path="taesdxl", output=1),
        "stand_in": config.StandIn(redraw=True, noise=0.02),
    }
    return config.Config(**{**values, **more})


SUMMARY: dict[str, Any] = {
    "starts": [{"config": {"out": "x"}, "step": 0, "precision": "bf16", "processes": 2}],
    "steps": 16000,
    "hours": 3.9,
    "val": {"psnr": 24.01, "stlpips": 0.081},
    "baseline": {"psnr": 23.78},
    "samples": {"data/train-0*.tar": 1722},
    "skipped": 3,
    "encoder": {"name": "taesdxl-encoder", "hash": "abc123"},
    "machine": "a small machine",
}


def export(out: Path, model: FastDecoder | None = None, summary: dict[str, Any] = SUMMARY, **more: Any) -> Path:
    return module("export").write_export(out, model or SubpixelDecoder(**SHAPE), make_config(out, **more), summary)


# ---------------------------------------------------------------- export


def test_an_export_is_the_model_in_float16(tmp_path: Path) -> None:
    model = SubpixelDecoder(**SHAPE)
    model.decoder.to(memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    place = export(tmp_path / "run", model)
    assert place == tmp_path / "run/export"
    assert sorted(p.name for p in place.iterdir()) == ["README.md", "config.json", WEIGHTS, "run.json"]
    loaded = FastDecoder.from_pretrained(place, torch_dtype=torch.float16)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])  # the model is left as it was
        assert torch.equal(value.half(), loaded.state_dict()[key])
    run = json.loads((place / "run.json").read_text())
    assert run.items() >= SUMMARY.items()
    assert run["versions"]["torch"]
    export(tmp_path / "run", SubpixelDecoder(**SHAPE))  # the run's own export is replaced
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["export"]


def test_the_card_tells_what_the_run_was(tmp_path: Path) -> None:
    text = (export(tmp_path / "tiny") / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers")
    assert card.data.datasets == ["someone/pictures"]
    assert "sdxl" in card.data.tags
    told = [
        "# tiny", "`SubpixelDecoder`", "K multiply-accumulates per pixel", "float16", f'from_pretrained("{tmp_path.as_posix()}/tiny/export"',
        "1,722 pictures of `data/train-0*.tar`, short side at least 256 px, aesthetic score 5.5 to 10, with a face",
        "`hf:someone/pictures:train`", "clips of `videos/*.tar`, classes Archery", "3 samples could not be read",
        "TAESDXL's encoder", "`abc123`", "a stand-in for the encoder of SDXL", "drawn anew", "up to 0.02",
        "| `l1` | 1 | L1 |", "| `stlpips` | 0.25 | shift-tolerant", "on 25% of each batch", "| `gan` | 0.8 | hinge discriminator from step 3,000",
        "16,000 steps in 3.9 hours on a small machine", "bf16", "| 0 | 128 px | 8 |", "| PSNR, dB | 24.01 | 23.78 |",
        "not trained against the encoder of the VAE itself", "Apache-2.0. The first weights were random.",
    ]  # fmt: skip
    for part in told:
        assert part in text, part
    assert "`mse`" not in text  # its weight is 0
    assert "pictures of `taesdxl`" in text
    teacher = module("config").Teacher(path="taesdxl", output=2, structure=True, losses={"stlpips": 0.5, "mse": 0})
    text = (export(tmp_path / "structure", teacher=teacher) / "README.md").read_text()
    assert "| `teacher.output` | 2 | pictures, without their means over 8x8 px, of `taesdxl`, on latents: real |" in text
    assert "| `teacher.losses.stlpips` | 0.5 | `stlpips` to pictures of `taesdxl`, on latents: real |" in text and "losses.mse" not in text
    assert text.count("<!-- results -->") == text.count("<!-- end of results -->") == 1


def test_the_licence_is_that_of_the_initial_weights(tmp_path: Path) -> None:
    first = export(tmp_path / "a", init="taesdxl")
    second = export(tmp_path / "b", init=str(first))  # goes on from the first: the credit is handed on
    for place in (first, second):
        card = ModelCard((place / "README.md").read_text())
        assert (card.data.license, card.data.base_model) == ("mit", "madebyollin/taesdxl")
        assert "MIT, the licence of the initial weights, which come from `madebyollin/taesdxl`." in card.text
        assert card.text.count("Weights by Ollin Boer Bohan") == 1
    assert "Before it the initial weights had 16,000 steps, in 3.9 hours;" in (second / "README.md").read_text()
    third = (export(tmp_path / "d", init=str(second)) / "README.md").read_text()
    assert "Before it the initial weights had 2 runs of 16,000, then 16,000 steps, in 7.8 hours;" in third
    assert json.loads((second / "run.json").read_text())["before"]["steps"] == 16_000
    assert "before" not in json.loads((first / "run.json").read_text()), "the baseline's weights come without a record"
    gone = (export(tmp_path / "c", init="nowhere-to-be-found") / "README.md").read_text()
    assert ModelCard(gone).data.license == "unknown"


def test_a_real_encoder_is_no_stand_in(tmp_path: Path) -> None:
    encoder = module("config").Encoder(path="someone/vae", posterior="mode")
    text = (export(tmp_path / "a", summary={}, encoder=encoder) / "README.md").read_text()
    assert "Latents of `someone/vae`, the posterior's mode." in text
    assert "stands in" not in text and "drawn anew" not in text
    assert "was not validated" in text


@pytest.mark.parametrize(
    "model",
    [
        TAEDecoder(width=8, latent_space="sd"),
        TAETemporalDecoder(width=32),
        EfficientViTDecoder(widths=(32, 16, 8), attention_blocks=1),
    ],
    ids=lambda model: type(model).__name__,
)
def test_every_family_can_be_exported(model: FastDecoder, tmp_path: Path) -> None:
    assert type(model).__name__ in (export(tmp_path / "run", model) / "README.md").read_text()


def test_what_does_not_come_back_as_it_was_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SubpixelDecoder(**SHAPE)
    export(tmp_path / "run", model)
    before = (tmp_path / "run/export" / WEIGHTS).read_bytes()
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match="not finite in float16"):
        export(tmp_path / "run", model)
    save = SubpixelDecoder.save_pretrained

    def lossy(self: Any, place: Path) -> None:
        save(self, place)
        save_file({key: value * 1.01 for key, value in load_file(place / WEIGHTS).items()}, place / WEIGHTS, {"format": "pt"})

    monkeypatch.setattr(SubpixelDecoder, "save_pretrained", lossy)
    with pytest.raises(ValueError, match="is not what was saved"):
        export(tmp_path / "run")
    assert (tmp_path / "run/export" / WEIGHTS).read_bytes() == before
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["export"]


def test_the_summary_of_a_log(tmp_path: Path) -> None:
    lines = [
        {"config": {"lr": 1}, "step": 0, "time": 0, "precision": "no"},
        {"data": {"samples": {"a": 3}, "skipped": 1}},
        {"baseline": {"psnr": 20}},
        {"step": 10, "time": 1800, "norm": 1.0, "l1": 0.5},
        {"step": 10, "val": {"psnr": 21}},
        {"config": {"lr": 2}, "step": 10, "time": 9000},
        {"step": 20, "time": 10800, "norm": 1.0, "l1": 0.4},
    ]
    found = module("export").summary(write_log(tmp_path, lines, torn='{"step": 30, "no'))
    assert [start["config"]["lr"] for start in found.pop("starts")] == [1, 2]
    assert found == {"steps": 20, "hours": 1.0, "val": {"psnr": 21}, "baseline": {"psnr": 20}, "samples": {"a": 3}, "skipped": 1}


# ---------------------------------------------------------------- publish


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module("publish"), "CARDS", tmp_path / "hub_cards")
    return tmp_path / "hub_cards"


def test_publishing_and_replacing(tmp_path: Path, cards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = export(tmp_path / "run")
    (place / "quality.json").write_text("{}")
    (place / "notes.txt").write_text("not for the Hub")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "_name_or_path": str(place)}))  # as a decoder that was loaded and saved again has it
    assert call("publish", tmp_path / "run", "subpixel-sdxl") == 0
    told = capsys.readouterr().out
    assert "MB" in told and "Preset(" in told  # presets.py has another shape
    found = cards / "subpixel-sdxl"
    assert sorted(p.name for p in found.iterdir()) == ["README.md", "config.json", WEIGHTS, "quality.json", "run.json"]
    text = (found / "README.md").read_text()
    assert "# subpixel-sdxl\n" in text and 'from_pretrained("subpixel-sdxl"' in text and str(tmp_path) not in text
    assert (found / WEIGHTS).read_bytes() == (place / WEIGHTS).read_bytes()
    assert json.loads((found / "config.json").read_text()) == config

    again = export(tmp_path / "again")
    assert call("publish", again, "subpixel-sdxl") == 2
    assert "pass --force" in capsys.readouterr().err
    assert (found / WEIGHTS).read_bytes() == (place / WEIGHTS).read_bytes()
    assert call("publish", again, "subpixel-sdxl", "--force") == 0
    assert (found / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()
    assert not (found / "quality.json").exists()  # they were the other weights'
    assert [p.name for p in cards.iterdir()] == ["subpixel-sdxl"]


@pytest.mark.parametrize(
    ("preset", "run", "summary", "message"),
    [
        ("subpixel-xl", "run", {}, "there is no preset 'subpixel-xl'; the names are subpixel-sdxl"),
        ("taesdxl", "run", {}, "taesdxl is a baseline"),
        ("subpixel-sdxl", "debug-3", {}, "debug run"),
        ("subpixel-sdxl", "run", {"starts": [{"config": {"out": "runs/debug"}}]}, "debug run"),
        ("subpixel-sdxl", "run", {"steps": 999}, "trained for 999 steps, a preset needs at least 1,000"),
        ("subpixel-sdxl", "run", {"val": {}}, "never evaluated"),
        ("subpixel-sd", "run", {}, "latent_space 'sdxl' instead of 'sd'"),
        ("tae-192-sdxl", "run", {}, "class_name 'SubpixelDecoder' instead of 'TAEDecoder', width None instead of 192"),
    ],
)  # fmt: skip
def test_what_is_refused(
    preset: str, run: str, summary: dict[str, Any], message: str, tmp_path: Path, cards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(tmp_path / run, summary={**SUMMARY, **summary})
    assert call("publish", tmp_path / run, preset) == 2
    assert message in capsys.readouterr().err
    assert not cards.exists()


def test_weights_and_folders_that_are_refused(tmp_path: Path, cards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str) -> None:
        assert call("publish", tmp_path / "run", "subpixel-sdxl") == 2
        assert message in capsys.readouterr().err
        assert not cards.exists()

    refused("holds no export")
    place = export(tmp_path / "run")
    stored = load_file(place / WEIGHTS)
    name = next(iter(stored))

    def write(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, place / WEIGHTS, {"format": "pt"})

    write({**stored, name: torch.full_like(stored[name], math.nan)})
    refused("is not finite")
    write({key: value.float() for key, value in stored.items()})
    refused("torch.float32: presets are in float16")
    write({key: value for key, value in stored.items() if key != name})
    refused("1 missing tensors")
    export(tmp_path / "run", init="nowhere-to-be-found")
    refused("find that of its initial weights")
    (place / "run.json").unlink()
    refused("lacks run.json")


def test_a_copy_that_fails_leaves_the_old_folder(tmp_path: Path, cards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = module("publish")
    publish.publish(export(tmp_path / "run"), "subpixel-sdxl")
    before = {p.name: p.read_bytes() for p in (cards / "subpixel-sdxl").iterdir()}
    copyfile, replace = publish.shutil.copyfile, module("export").os.replace

    def full(source: Path, target: Path) -> None:
        if source.name == WEIGHTS:
            raise OSError(28, "No space left on device")
        copyfile(source, target)

    def last_step_fails(source: Path, target: Path) -> None:
        if source.suffix == ".part":
            raise OSError(5, "Input/output error")
        replace(source, target)

    again = export(tmp_path / "again")
    for owner, name, failing in ((publish.shutil, "copyfile", full), (module("export").os, "replace", last_step_fails)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            assert call("publish", again, "subpixel-sdxl", "--force") == 2
        assert {p.name: p.read_bytes() for p in (cards / "subpixel-sdxl").iterdir()} == before
        assert [p.name for p in cards.iterdir()] == ["subpixel-sdxl"]


def test_the_repositorys_own_presets_bear_their_names() -> None:
    publish = module("publish")
    for name in publish.NAMES:
        if (publish.CARDS / name).exists():
            publish.check_weights(folder(name), name, publish.check_name(name))
            assert publish.preset_line(name) is None
