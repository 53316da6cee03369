"""The self-test: behind `fld check` and `--dtype auto`."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fast_latent_decoders import FastDecoder, SubpixelDecoder
from fast_latent_decoders.cli import app, loading
from fast_latent_decoders.evaluation import check, robustness
from fast_latent_decoders.evaluation.check import Trial, best, fastest_dtype, self_test


def tiny() -> SubpixelDecoder:
    return SubpixelDecoder(widths=(16, 8, 8), blocks=(1, 1, 1), convs=1).eval()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    decoder = tiny()
    with torch.no_grad():
        first = next(layer for layer in decoder.decoder.modules() if isinstance(layer, torch.nn.Conv2d))
        first.weight.mul_(1e6)  # beyond 65504 behind this layer, finite in float32 and bfloat16
    decoder.save_pretrained(tmp_path / "broken")
    return tmp_path / "broken"


def test_the_choice_leaves_the_decoder_and_torch_as_they_were() -> None:
    decoder = tiny()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    threads = torch.get_num_threads()
    assert fastest_dtype(decoder, "cpu") in (torch.float32, torch.bfloat16)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_every_format_and_layout_is_tried_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SLOW", float("inf"))
    trials = self_test(tiny(), "cpu")
    assert len({(trial.dtype, trial.layout) for trial in trials}) == len(trials) == 6
    assert [trial for trial in trials if trial.problem] == []
    assert all(trial.error is not None and trial.ms is not None for trial in trials)


def test_a_slow_format_is_not_tried_in_the_other_layout() -> None:
    trials = [Trial("float32", "channels_last", ms=1.0), Trial("float16", "channels_last", ms=3.5)]
    assert check._slow(trials, "float16") == "float16 takes 3.5 times as long as float32, so its other layouts were not tried"
    assert check._slow(trials, "float32") is check._slow(trials, "bfloat16") is None


def test_less_exact_formats_win_by_a_margin_only() -> None:
    exact = Trial("float32", "channels_last", ms=10.0)
    half = Trial("float16", "channels_last", ms=5.0)
    assert best([exact, Trial("bfloat16", "channels_last", ms=9.5)], "cpu") is exact
    assert best([exact, half], "cpu") is exact  # float16 never, on a CPU
    assert best([exact, half, Trial("bfloat16", "channels_last", ms=4.9)], "cuda") is half
    assert best([exact, Trial("float16", "channels_last", ms=1.0, problem="wrong", broken=True)], "cuda") is exact
    assert best([], "cpu") is None


def test_a_device_that_does_not_compute_is_told_from_a_wrong_picture() -> None:
    trials = self_test(tiny(), "meta", ("float32",), ("channels_last",))  # a device whose tensors hold nothing
    assert trials[0].problem and trials[0].problem.startswith("float32 does not run on meta: ") and not trials[0].broken
    with pytest.raises(ValueError, match="does not run on meta"):
        fastest_dtype(tiny(), "meta")


def test_a_picture_that_differs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.ALLOWED, "bfloat16", 0.0)
    (trial,) = self_test(tiny(), "cpu", ("bfloat16",), ("channels_last",))
    assert trial.broken and trial.problem and "/255 (rms) from float32 on the CPU" in trial.problem


def test_check(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "tiny")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "tiny"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "fastest in " in result.stdout and result.stdout.count("right") >= 4
    said = json.loads(CliRunner().invoke(app, ["check", str(tmp_path / "tiny"), "--device", "cpu", "--json"]).stdout)
    assert said["works"] and said["best"]["dtype"] in ("float32", "bfloat16") and said["problems"] == []


def test_check_says_what_is_broken(broken: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(broken), "--device", "cpu"])
    assert result.exit_code == 1, result.output
    assert "float16 gives NaN or infinite values on cpu: do not use it with this decoder" in result.stderr
    assert "fastest in " in result.stdout  # the others work
    said = json.loads(CliRunner().invoke(app, ["check", str(broken), "--device", "cpu", "--json"]).stdout)
    assert not said["works"] and len(said["problems"]) == 1


def test_check_of_weights_that_are_nan(tmp_path: Path) -> None:
    decoder = tiny()
    with torch.no_grad():
        next(decoder.decoder.parameters()).fill_(float("nan"))
    decoder.save_pretrained(tmp_path / "nan")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "nan"), "--device", "cpu"])
    assert result.exit_code == 1
    assert "its weights are broken" in result.stderr and "does not work on cpu" in result.stderr


def test_auto_falls_back_to_the_cpu_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(loading, "find_device", lambda name: "meta")
    assert loading.load_decoder(str(tmp_path / "tiny"), "auto", "auto").device.type == "cpu"
    assert "note: float32 does not run on meta" in capsys.readouterr().err


def test_robustness_of_a_decoder_and_of_one_that_overflows(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "SIDE", 16)
    cases = robustness.robustness(FastDecoder.from_pretrained("taesdxl").eval())
    assert all(case.passed for case in cases)
    by_name = {case.name: case for case in cases}
    assert by_name["constant 100"].activation < 100  # the squash holds
    assert 0 < by_name["smooth"].differences["float16"] < by_name["smooth"].differences["bfloat16"] < 40
    result = CliRunner().invoke(app, ["check", str(broken), "--robust"])
    assert result.exit_code == 1
    assert "not finite" in result.stdout
    told = json.loads(CliRunner().invoke(app, ["check", str(broken), "--robust", "--json"]).stdout)
    assert {case["name"] for case in told["cases"]} == set(by_name)
    assert not any(case["passed"] for case in told["cases"])
