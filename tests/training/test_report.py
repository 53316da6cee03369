"""The report of runs: curves, settings that differ, pictures."""

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .tiny import call, write_log


class Text(HTMLParser):
    """Text and the sources of pictures; tags must be closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.pictures = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img" and str(dict(attrs)["src"]).startswith("data:image/png;base64,")
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def fabricate(run: Path, lr: float, torn: str = "") -> Path:
    config = {"lr": lr, "warmup": 10, "steps": 400, "final_lr": 0.02, "losses": {"l1": 1}, "out": "same"}
    lines: list[Any] = [{"config": config, "step": 0}, {"baseline": {"psnr": 25.0, "stlpips": 0.09}}, {"unheard": "of"}, 3]
    for step in range(50, 401, 50):
        lines.append({"step": step, "time": step, "norm": 1.0, "lr": lr, "l1": 10 / step, "gan": -0.1, "waiting": 0.1, "crops_per_s": 40.0})
        lines.append({"step": step, "val": {"psnr": 20 + step / 100, "stlpips": None, "flat_psnr": math.nan}})
    write_log(run, lines, torn)
    (run / "pictures").mkdir()
    for number in (9, 10):
        Image.new("RGB", (8, 8)).save(run / f"pictures/{number}.png")
    return run


def test_a_report_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [fabricate(tmp_path / "one", 1e-3), fabricate(tmp_path / "two <b>", 2e-3, torn='{"step": 450, "ti')]
    write_log(tmp_path / "begun", [])
    out = tmp_path / "report.html"
    assert call("report", *runs, tmp_path / "begun", "--out", out, "--png") == 0
    source = out.read_text()
    page = Text()
    page.feed(source)
    assert page.open == []
    assert "http-equiv" not in source and 'src="http' not in source  # nothing is fetched
    for part in (
        "one",
        "two <b>",
        "begun",
        "loss: l1",
        "loss: gan",
        "PSNR, dB",
        "learning rate",
        "crops a second",
        "baseline",
        "0.025",
    ):
        assert part in page.text, part
    assert "24 (baseline 25)" in page.text
    assert page.pictures == 2 and "one: 10.png" in page.text
    differs = page.text.split("What differs")[1]
    assert "lr" in differs and "warmup" not in differs
    assert Image.open(tmp_path / "report.png").width > 1000

    capsys.readouterr()
    assert call("report", *runs, "--markdown") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| run | `lr` | steps | PSNR, dB |")
    assert printed[2].startswith("| one | 0.001 | 400 | 24 |")

    assert call("report", runs[0], "--out", out) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == source
    assert call("report", runs[0], "--out", out, "--force") == 0


def test_a_folder_without_a_log_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("report", tmp_path, "--out", tmp_path / "report.html") == 2
    assert "holds no log.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
