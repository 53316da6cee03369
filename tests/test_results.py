"""Tables in cards and README are those of the records beside the weights, and the records are of these very weights."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fast_latent_decoders.evaluation.decoders import load_candidate
from fast_latent_decoders.presets import presets

from .test_bench import made_up, row

ROOT = Path(__file__).parent.parent
MARKS = "# card\n\n<!-- results -->\n<!-- end of results -->\n\nand more\n"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    return importlib.import_module("results")


def call(results: ModuleType, *words: object) -> int:
    old, sys.argv = sys.argv, ["results.py", *map(str, words)]
    try:
        results.main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = old
    return 0


def figure(mean: float, **more: Any) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.5, "high": mean + 0.5, "n": 9, **more}


def quality() -> dict[str, Any]:
    change = {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 9}
    shares = {share: {"a": {"psnr": figure(24 + i, difference=change)}, "b": {"psnr": figure(23)}} for i, share in enumerate(("0", "0.5", "1"))}
    source = {"path": "val.tar", "kind": "pictures"}
    encoder = {"name": "the tiny sdxl encoder", "weights": "abc", "posterior": "mode"}
    return {
        "date": "2026-01-01", "machine": "Some CPU", "n": 9, "baseline": "b", "reference": None, "failed": {}, "figures": shares,
        "protocol": {"size": 256, "sources": [source], "encoder": encoder, "seed": 0},
        "colours": {"a": {"n": 8, "psnr": 40.0, "p95": 2.0, "worst": 9.0, "textured": 41.0}},
        "unavailable": {"lpips_vgg": "vgg16.pth cannot be downloaded (somewhere: no such host)"},
    }  # fmt: skip


@pytest.mark.parametrize("preset", [name for name, preset in presets().items() if (ROOT / "hub_cards" / name / "quality.json").exists()])
def test_the_shipped_tables_are_those_of_their_records(preset: str, results: ModuleType) -> None:
    assert call(results, preset, "--check") == 0
    record = json.loads((ROOT / "hub_cards" / preset / "quality.json").read_text())
    assert record["protocol"]["decoders"][preset] == load_candidate(preset, "cpu").hash, "the record is of other weights"


def test_records_are_kept_and_tables_written_and_checked(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "CARDS", tmp_path)
    card = tmp_path / "a" / "README.md"
    card.parent.mkdir()
    card.write_text(MARKS)
    (tmp_path / "report.json").write_text(json.dumps(quality()))
    (tmp_path / "bench.json").write_text(json.dumps(made_up(row("a", 12.5), row("a", 9.5, mode="compiled"), row("a", 5.0, dtype="bfloat16"))))
    assert call(results, "a", "--quality", tmp_path / "report.json", "--speed", tmp_path / "bench.json") == 0
    text = card.read_text()
    assert text.startswith("# card\n") and text.endswith("and more\n")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| `a` | 1.00 M | 2.0 | 100 K | 9.50 / 5.00 |" in lines
    assert "| `a` | 0.5 | 25.00 ± 0.50 |" in lines  # the middle share comes first
    assert "| `a` | **+1.00 [+0.50, +1.50]** |" in lines
    assert "| `a` | 40.0 | 2.0 | 9.0 | 41.0 |" in lines
    for told in ("Some CPU", "2026-01-01", "the tiny sdxl encoder", "val.tar", "torch 2.14.1"):
        assert told in text
    assert "no such host" not in text + (tmp_path / "a" / "quality.json").read_text()

    assert call(results, "a", "--check") == 0
    card.write_text(text.replace("25.00", "26.00"))
    assert call(results, "a", "--check") == 1
    assert "26.00" in card.read_text()
    assert call(results, "a") == 0 and card.read_text() == text


def test_the_summary_has_who_was_measured_and_the_own_decoder(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "CARDS", tmp_path)
    record = quality()
    for name, ssim, change in (("a", 0.4, -0.1), ("b", 0.5, None)):
        more = {"difference": {"mean": change, "low": change - 0.05, "high": change + 0.05, "n": 9}} if change else {}
        record["figures"]["0.5"][name] |= {"ssim": figure(ssim, **more), "stlpips": figure(ssim, **more), "ssimulacra2": figure(ssim)}
    rows = [row(name, ms, dtype=dtype) for name, ms, dtype in (("a", 9.5, "float32"), ("a", 5.0, "bfloat16"), ("b", 15.0, "bfloat16"))]
    times = made_up(row("sdxl-vae", 900.0), row("tae-192", 800.0), *rows)
    times["decoders"] = [{**times["decoders"][0], "name": name} for name in ("a", "b", "tae-192", "sdxl-vae")]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "quality.json").write_text(json.dumps(record))
    (tmp_path / "a" / "speed.json").write_text(json.dumps(times))
    lines = [" ".join(line.split()) for line in results.summary("a").splitlines() if line.startswith("| `")]
    assert lines == [
        "| `a` | 2.0 | 5.00 (bf16) | 3.0 | **25.00** | 0.4000 | 0.40 | **0.4000** | 40.0 |",
        "| `b` | 2.0 | 15.0 (bf16) | 1.0 | 23.00 | 0.5000 | 0.50 | 0.5000 | - |",
        "| `sdxl-vae` | 2.0 | 900 (fp32) | 0.02 | - | - | - | - | - |",
    ]


def asked_of(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, psnr: float, low: float) -> list[str]:
    """The one row of targets, of a decoder with this difference in PSNR at half of the table and from `low` on with all of it."""
    record = quality()
    record["colours"]["b"] = {"psnr": 30.0, "worst": 30.0, "textured": 41.5}
    for share, figures in record["figures"].items():
        for name in figures:
            figures[name] |= {"tint": figure(1.0), "sharpness": figure(0.95), **{f"tint_{c}": figure(-0.5) for c in "rgb"}}
            figures[name] |= {metric: figure(0.5, difference={"mean": -0.01, "low": -0.02, "high": 0.0}) for metric in results.targets.QUALITY[1:]}
        figures["a"]["psnr"]["difference"] = {"mean": psnr, "low": low, "high": low + 0.1} if share == "1" else {"mean": psnr, "low": psnr, "high": psnr}
    monkeypatch.setattr(results.targets, "WANTED", {"a": {"psnr": 0.7, "stlpips": 0.0, "flat": 42.0}})
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "quality.json").write_text(json.dumps(record))
    rows = [line for line in results.targets.markdown(tmp_path).splitlines() if line.startswith("| `a`")]
    assert len(rows) == 1, "in the table of pictures only"
    return [" ".join(part.split()) for part in rows[0].strip("|").split("|")]


def test_targets_in_bold_fall_short(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, psnr, ssim, _, _, stlpips, channel, size, sharp, flat, worst, textured, back = asked_of(results, tmp_path, monkeypatch, 0.8, 0.1)
    assert (name, psnr, stlpips, ssim) == ("`a`", "+0.80 (0.70)", "-0.0100 (0.0000)", "-0.0100")  # SSIM was not asked for
    assert (channel, size, sharp) == ("-0.5 (1.0)", "**1.00** (1.00)", "0.95 (0.90)")
    assert (flat, worst, textured, back) == ("**40.0** (42.0)", "9.0", "**41.0** (41.5)", "none")
    fallen = asked_of(results, tmp_path, monkeypatch, 0.5, -0.3)
    assert fallen[1] == "**+0.50** (0.70)" and fallen[-1] == "PSNR at 1"

    rival = json.loads((tmp_path / "a" / "quality.json").read_text())
    for figures in rival["figures"].values():
        figures["c"] = {**figures["a"], "psnr": figure(25, difference={"mean": 0.9, "low": 0.9, "high": 0.9})}
    rival["colours"]["c"] = rival["colours"]["a"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "quality.json").write_text(json.dumps(rival))
    monkeypatch.setattr(results.targets, "RIVALS", {"a": ["c"]})
    monkeypatch.setattr(results.targets, "WANTED", {name: {"psnr": 0.7, "flat": 42.0} for name in "ac"})
    rows = [line.split("|")[2].strip() for line in results.targets.markdown(tmp_path).splitlines() if line.startswith(("| `a`", "| `c`"))]
    assert rows == ["**+0.50** (0.90)", "+0.90 (0.70)"]


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--quality", "[]", "is no report.json of fld evaluate"),
        ("--quality", json.dumps({**quality(), "figures": {"0": {"b": {}}}}), "did not measure a"),
        ("--speed", "{}", "is no record of fld bench"),
        ("--speed", json.dumps(made_up(row("b", 1.0))), "did not time a"),
    ],
)
def test_other_files_are_refused(
    option: str, content: str, message: str, results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "CARDS", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text(MARKS)
    (tmp_path / "file.json").write_text(content)
    assert call(results, "a", option, tmp_path / "file.json") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["README.md"]


def test_a_card_without_marks_is_refused(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(results, "CARDS", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("# card\n")
    assert call(results, "a") == 2
    assert "<!-- results -->" in capsys.readouterr().err
