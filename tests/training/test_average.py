"""The average of a run's weights and those it began with."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fast_latent_decoders import FastDecoder, SubpixelDecoder

from .tiny import config, module, run


def test_a_share_of_the_way_is_written_with_its_own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = SubpixelDecoder(widths=(16, 8, 8), blocks=(1, 1, 1), convs=1)
    begun.save_pretrained(tmp_path / "begun")
    run(config(tmp_path, "run"), f"init={tmp_path / 'begun'}", "steps=3", "gan.weight=0", "lr=0.01", monkeypatch=monkeypatch)
    out = tmp_path / "average"
    monkeypatch.setattr(sys, "argv", ["average.py", str(tmp_path / "run"), str(out), "--share", "0", "1", "--keep", "0.25"])
    module("average").main()
    made = FastDecoder.from_pretrained(out / "export").float().decoder.state_dict()
    last = FastDecoder.from_pretrained(tmp_path / "run/export").float().decoder.state_dict()
    for key, value in begun.decoder.state_dict().items():
        torch.testing.assert_close(made[key], 0.75 * value + 0.25 * last[key], rtol=1e-3, atol=1e-4)
        assert "bias" in key or not torch.equal(value, last[key])
    told, ran = (json.loads((folder / "export/run.json").read_text()) for folder in (out, tmp_path / "run"))
    assert (told["average"], told["val_of_run"], told["steps"]) == (0.25, ran["val"], 3)
    assert told["val"] != ran["val"]
    assert "0.25 of the run's and 0.75 of those it began with" in (out / "export/README.md").read_text()
    with pytest.raises(SystemExit):
        module("average").main()  # nothing is overwritten


def test_decoders_of_two_shapes_have_no_average() -> None:
    first, last = (SubpixelDecoder(widths=(16, 8, 8), blocks=(1, 1, n), convs=1) for n in (1, 2))
    with pytest.raises(ValueError, match="of one shape"):
        module("average").average(first, last, 0.5)
