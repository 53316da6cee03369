"""A run's configuration: what is wrong with one is said in a sentence, at the start."""

from pathlib import Path

import pytest

from fast_latent_decoders import FastDecoder, presets

from .tiny import ROOT, config, module, run


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
        ("teacher.losses={temporal: 1}", "unknown key 'temporal' in teacher.losses"),
        ("losses.tempral=1", "did you mean temporal?"),
        ("stages.0.crops=64", "unknown key 'crops' in .*did you mean crop?"),
        ("stages.0.crop=60", "crops must be multiples of 8 px"),
        ("teacher={structure: true, means: 48}", "crops must be multiples of teacher.means, 48 px"),
        ("teacher={structure: true, means: 0}", "teacher.means must be at least 1 px, got 0"),
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


@pytest.mark.parametrize("preset", sorted(presets().keys() - {"taesdxl", "taesd"}))  # the baselines have no run
def test_a_config_can_go_on_from_the_preset_of_its_name(preset: str) -> None:
    """README: `--config training/configs/subpixel-sdxl.yaml init=subpixel-sdxl`."""
    paths = list((ROOT / "training/configs").rglob(f"{preset}.yaml"))
    assert paths
    for path in paths:
        c = module("config").read_config(str(path), [])
        module("grow").grow(FastDecoder.from_pretrained(preset), module("config").build_decoder(c))


def test_a_config_lies_over_its_base(tmp_path: Path) -> None:
    base = config(tmp_path, "base")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nlosses: {mse: 1}\ngan: {weight: 0}\n")
    c = module("config").read_config(str(tmp_path / "mine.yaml"), [])
    assert (c.losses, c.gan.weight, c.gan.start, c.out) == ({"mse": 1.0}, 0, 6, str(tmp_path / "base"))
    assert base
