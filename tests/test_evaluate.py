"""`fld evaluate`: figures that anyone can compute again, broken data, runs that were stopped, and the report."""

import csv
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio
from typer.testing import CliRunner

from fast_latent_decoders import FastDecoder, SubpixelDecoder
from fast_latent_decoders.cli import app
from fast_latent_decoders.evaluation import colour, report, sheets
from fast_latent_decoders.evaluation.decoders import Candidate, colour_fit, colour_sums, load_candidate, recoloured
from fast_latent_decoders.evaluation.encoders import Encoder, StandIn, load_encoder
from fast_latent_decoders.evaluation.reading import read_picture
from fast_latent_decoders.evaluation.run import Eyes, Settings, decode_sample, prepare, slug, to_bytes
from fast_latent_decoders.evaluation.samples import Entry, Source
from fast_latent_decoders.files import write_latents

from .pipelines import tiny

CHEAP = ["--metric", "psnr", "--metric", "tint_r", "--features", "alexnet-st"]


@pytest.fixture
def decoder(tmp_path: Path) -> str:
    """A folder with a tiny decoder of random weights."""
    torch.manual_seed(0)
    SubpixelDecoder(widths=[8, 8, 8], blocks=[1, 1, 1], convs=1).save_pretrained(tmp_path / "decoder")
    return str(tmp_path / "decoder")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(80, 64), (64, 96), (70, 64)]):
        small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def fld(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "pictures.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_figures_can_be_computed_again_by_hand(tmp_path: Path, decoder: str, pictures: Path) -> None:
    out = tmp_path / "out"
    done = fld(pictures, "--decoder", f"mine, small={decoder}", "--decoder", "taesdxl", "--size", 64, "--out", out, *CHEAP)
    assert done.exit_code == 0, done.output
    results = json.loads((out / "report.json").read_text())
    assert (results["n"], results["baseline"]) == (3, "taesdxl")
    model = FastDecoder.from_pretrained("taesdxl").float()
    encoder = load_encoder(Encoder(), StandIn(), model)
    values = []
    for path in sorted(pictures.iterdir()):
        x = prepare(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None], 64)
        with torch.no_grad():
            y = model.decoder(encoder.encode(x.float() / 127.5 - 1))
        truth, made = (t[0].permute(1, 2, 0).numpy() for t in (x, to_bytes(y)))
        values.append(peak_signal_noise_ratio(truth, made, data_range=255))
    mine = [float(row["psnr"]) for row in rows_of(out) if row["decoder"] == "taesdxl"]
    assert mine == pytest.approx(values, abs=0.02)
    figure = results["figures"]["0"]["taesdxl"]["psnr"]
    assert figure["mean"] == pytest.approx(np.mean(values), abs=0.02)
    assert figure["low"] <= figure["mean"] <= figure["high"]
    difference = results["figures"]["0"]["mine, small"]["psnr"]["difference"]
    assert difference["n"] == 3
    assert difference["mean"] < 0
    distance = results["distances"]["0"]["taesdxl"]["alexnet-st"]
    assert (distance["n"], distance["comparable"]) == (3, False)
    assert "not comparable: n < d" in (out / "report.md").read_text()


@pytest.mark.parametrize(("shape", "size", "expected"), [((50, 70), 32, (32, 32)), ((50, 71), None, (48, 64)), ((20, 300), 64, (64, 64))])
def test_samples_are_brought_to_one_size(shape: tuple[int, int], size: int | None, expected: tuple[int, int]) -> None:
    x = torch.randint(0, 255, (2, 3, *shape), dtype=torch.uint8)
    y = prepare(x, size)
    assert (tuple(y.shape), y.dtype) == ((2, 3, *expected), torch.uint8)
    if size is None:
        assert torch.equal(y, x[..., 1:49, 3:67])


def test_a_picture_smaller_than_a_latent_is_a_failure_with_a_reason() -> None:
    with pytest.raises(ValueError, match="smaller than one latent"):
        prepare(torch.zeros(1, 3, 4, 40, dtype=torch.uint8), None)


def test_an_evaluation_that_was_stopped_goes_on(tmp_path: Path, decoder: str, pictures: Path) -> None:
    call = [pictures, "--decoder", decoder, "--size", 64, *CHEAP]
    assert fld(*call, "--out", tmp_path / "whole").exit_code == 0
    out = tmp_path / "out"
    assert fld(*call, "--out", out).exit_code == 0
    lines = (out / "samples.jsonl").read_text().splitlines()
    (out / "samples.jsonl").write_text(lines[0] + "\n" + lines[1][:40])  # killed while it wrote the second sample
    done = fld(*call, "--out", out)
    assert done.exit_code == 0, done.output
    assert rows_of(out) == rows_of(tmp_path / "whole")
    for network in ("truth", slug(decoder, 0.0)):
        a, b = ((tmp_path / name / f"alexnet-st--{network}.f32").read_bytes() for name in ("whole", "out"))
        assert a == b
    again = fld(pictures, "--decoder", decoder, "--size", 32, *CHEAP, "--out", out)
    assert again.exit_code == 2
    assert "under another protocol (size was 64, is 32" in again.output
    assert fld(pictures, "--decoder", decoder, "--size", 32, *CHEAP, "--out", out, "--force").exit_code == 0


def test_broken_and_odd_pictures(tmp_path: Path, decoder: str, pictures: Path) -> None:
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (pictures / "empty.png").write_bytes(b"")
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(pictures / "grey.png")
    Image.fromarray(rng.integers(0, 255, (64, 64, 4), dtype=np.uint8), "RGBA").save(pictures / "alpha.png")
    Image.fromarray(rng.integers(0, 65535, (64, 64), dtype=np.uint16)).save(pictures / "deep.png")
    Image.fromarray(rng.integers(0, 255, (64, 64, 4), dtype=np.uint8), "CMYK").save(pictures / "inks.jpg")
    out = tmp_path / "out"
    done = fld(pictures, "--decoder", decoder, "--size", 0, "--out", out, *CHEAP)
    assert done.exit_code == 1
    results = json.loads((out / "report.json").read_text())
    assert results["n"] == 7
    assert sorted(Path(key).name for key in results["failed"]) == ["broken.jpg", "empty.png"]
    assert "broken.jpg" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "matches no file or folder"),
        (["{pictures}", "--decoder", "taesdx"], "did you mean taesdxl"),
        (["{pictures}", "--decoder", "taesdxl", "--metric", "pnsr"], "pnsr"),
        (["{pictures}", "--decoder", "taesdxl", "--baseline", "taesd"], "is none of the decoders"),
        (["{pictures}", "--decoder", "taesdxl", "--encoder", "{pictures}"], "no VAE that diffusers can load"),
        (["{empty}"], "holds no pictures"),
        (["{pictures}", "--agreement"], "holds no latents"),
        (["{pictures}", "--agreement", "--decoder", "taesdxl"], "give at least two"),
        (["{pictures}", "--latents", "{empty}/none"], "there is no such folder"),
        (["{pictures}", "--latents", "{empty}", "--encoder", "{pictures}"], "nothing is encoded"),
        (["{pictures}", "--latents", "{empty}", "--agreement"], "give one of them"),
    ],
)
def test_wrong_calls_are_sentences(arguments: list[str], message: str, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    filled = [part.format(pictures=pictures, empty=tmp_path / "empty") for part in arguments]
    done = fld(*filled, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_one_picture_and_metrics_that_are_not_there(tmp_path: Path, decoder: str, pictures: Path) -> None:
    out = tmp_path / "out"
    done = fld(pictures / "0.png", "--decoder", decoder, "--size", 64, "--out", out, "--metric", "psnr", "--metric", "lpips_vgg", "--features", "inception")
    assert done.exit_code == 0, done.output
    results = json.loads((out / "report.json").read_text())
    figure = results["figures"]["0"][decoder]["psnr"]
    assert figure["n"] == 1
    for name, why in results["unavailable"].items():
        assert f"{name}: not available: {why}" in (out / "report.md").read_text()
    assert "lpips_vgg" in {*results["unavailable"], *results["figures"]["0"][decoder]}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures, self.headings, self.within = 0, [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.within = tag
        self.pictures += tag == "img" and str(dict(attrs)["src"]).startswith("data:image/png;base64,")

    def handle_data(self, data: str) -> None:
        if self.within == "h2":
            self.headings.append(data)


def test_a_colour_table_is_reported_at_three_shares_beside_real_colours(tmp_path: Path, decoder: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str, float]] = []

    def noted(protocol: Settings, eyes: Eyes, candidates: Sequence[Candidate], source: Source, entry: Entry) -> Any:
        assert (tmp_path / "out" / "report.json").exists()  # figures do not wait for pictures
        shown.extend((entry.key, candidate.name, share) for candidate in candidates for share in protocol.shares)
        return decode_sample(protocol, eyes, candidates, source, entry)

    monkeypatch.setattr(sheets, "decode_sample", noted)
    save_file({"delta": torch.full((4, 21, 21, 21), 0.3)}, tmp_path / "table.safetensors")
    colours = {"srgb": torch.rand(3, 3), "latent": torch.randn(3, 4)}
    save_file(colours, tmp_path / "colours.safetensors")
    out = tmp_path / "out"
    done = fld(
        pictures, "--decoder", decoder, "--decoder", "taesdxl", "--size", 64, "--out", out, *CHEAP,
        "--colour-table", tmp_path / "table.safetensors", "--colours", tmp_path / "colours.safetensors",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    results = json.loads((out / "report.json").read_text())
    assert list(results["figures"]) == ["0", "0.5", "1"]
    psnr = {share: results["figures"][share]["taesdxl"]["psnr"]["mean"] for share in results["figures"]}
    assert len(set(psnr.values())) == 3
    assert all(results["figures"][share]["taesdxl + affine colour"]["psnr"]["n"] == 3 for share in ("0", "0.5", "1"))
    affine = results["figures"]["0.5"]["taesdxl + affine colour"]["psnr"]["mean"]
    assert affine > psnr["0.5"]
    assert set(results["colours"]) == {decoder, "taesdxl"}
    page = Page((out / "report.html").read_text())
    assert page.pictures >= 4
    assert any(heading.startswith("Flat colours of taesdxl") for heading in page.headings)
    assert any(heading.startswith("Worst of") for heading in page.headings)
    # the contact sheet and those of the worst show the same samples: decoded once, at the middle alone
    assert sorted(shown) == sorted({(key, name, 0.5) for key, name, _ in shown}) and len(shown) == 6


def test_flat_colours_are_measured_at_the_centre() -> None:
    """A decoder that makes the colour asked for, plus a tenth of full scale in red: 20 log10(1 / (0.1 / sqrt(3))) dB."""
    encoder = load_encoder(Encoder(), StandIn(), FastDecoder.from_pretrained("taesdxl"))
    asked = torch.rand(9, 3) * 0.8
    encoder.colours = {"srgb": asked, "latent": torch.cat([asked, torch.zeros(9, 1)], 1)}

    def decode(z: torch.Tensor, frames: int) -> torch.Tensor:
        y = torch.nn.functional.interpolate(z[:, :3], scale_factor=8) * 2 - 1
        y[:, 0] += 0.2
        y[..., 0] = 5  # borders are no matter
        return y

    found = colour.flat_colours(decode, encoder)
    assert found.psnr == pytest.approx(20 * np.log10(3**0.5 / 0.1), abs=0.01)
    assert found.worst == pytest.approx(25.5, abs=0.01)
    assert colour.draw_swatches(found, side=4).size[0] > 4


def test_the_best_affine_colour_is_found() -> None:
    truth = torch.rand(2, 3, 16, 16) - 0.5
    matrix = torch.tensor([[0.9, 0.1, 0.0, 0.02], [0.0, 0.8, 0.1, -0.05], [0.1, 0.0, 1.1, 0.0]])
    seen = torch.einsum("ij,njhw->nihw", torch.linalg.inv(matrix[:, :3]), truth - matrix[:, 3, None, None])
    sums = sum(torch.tensor(colour_sums(seen[i : i + 1], truth[i : i + 1])) for i in range(2))
    assert seen.abs().max() <= 1
    assert torch.allclose(colour_fit(sums), matrix, atol=1e-4)
    base = load_candidate("taesdxl", "cpu")
    z = torch.randn(1, 4, 4, 4)
    assert torch.allclose(recoloured(base, torch.eye(3, 4)).decode(z, 1), base.decode(z, 1), atol=1e-5)


def clip(path: Path, frames: int = 12) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for i in range(frames):
            pixels = np.full((64, 64, 3), 90, np.uint8)
            pixels[8:40, i : i + 32] = (200, 30, 90)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_clips(tmp_path: Path, decoder: str) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.avi"):
        clip(tmp_path / "clips" / name)
    out = tmp_path / "out"
    done = fld(tmp_path / "clips", "--clips", "--decoder", decoder, "--decoder", "taesdxl", "--size", 64, "--frames", 4, "--out", out, *CHEAP[:4], "--features", "i3d")
    assert done.exit_code == 0, done.output
    results = json.loads((out / "report.json").read_text())
    figures = results["figures"]["0"]["taesdxl"]
    assert {"psnr", "temporal_difference", "flicker"} <= figures.keys()
    assert figures["psnr"]["n"] == 2
    assert any(heading.startswith("Frames of") for heading in Page((out / "report.html").read_text()).headings)
    film = out / "side-by-side.mp4"
    with av.open(str(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4
    assert "join_error" not in figures
    out = tmp_path / "chunks"
    done = fld(tmp_path / "clips", "--clips", "--decoder", "taesdxl", "--size", 64, "--frames", 4, "--chunk", 3, "--out", out, *CHEAP[:4], "--features", "i3d")
    assert done.exit_code == 0, done.output
    chunked = json.loads((out / "report.json").read_text())["figures"]["0"]["taesdxl"]
    assert chunked["join_error"]["n"] == 2 and chunked["psnr"] == figures["psnr"]  # a decoder of single frames has no joins


def test_ready_latents_take_the_encoders_place(tmp_path: Path, decoder: str, pictures: Path) -> None:
    (tmp_path / "latents").mkdir()
    eyes = load_encoder(Encoder(), StandIn(), FastDecoder.from_pretrained("taesdxl"))
    for path in sorted(pictures.iterdir())[:2]:  # the third one has none
        z = eyes.encode(prepare(read_picture(path.open("rb")), None).float() / 127.5 - 1)
        write_latents(tmp_path / "latents" / f"{path.stem}.safetensors", z, "sdxl", "scaled")
    shared = ["--decoder", decoder, "--decoder", "taesdxl", *CHEAP]
    encoded = fld(pictures, *shared, "--size", 0, "--out", tmp_path / "encoded")
    ready = fld(pictures, *shared, "--latents", tmp_path / "latents", "--out", tmp_path / "ready")
    assert (encoded.exit_code, ready.exit_code) == (0, 1), ready.output
    assert "holds no latents 2" in ready.output
    wanted = {(row["key"], row["decoder"]): row["psnr"] for row in rows_of(tmp_path / "encoded") if not row["key"].endswith("2.png")}
    assert {(row["key"], row["decoder"]): row["psnr"] for row in rows_of(tmp_path / "ready")} == wanted
    write_latents(tmp_path / "latents" / "2.safetensors", torch.zeros(4, 3, 3), "sdxl", "scaled")
    again = fld(pictures, *shared, "--latents", tmp_path / "latents", "--out", tmp_path / "again")
    assert "do not belong together" in again.output


def test_latents_without_a_truth_are_compared_with_a_decoder(tmp_path: Path, decoder: str) -> None:
    (tmp_path / "latents").mkdir()
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    write_latents(tmp_path / "latents" / "three.safetensors", z, "sdxl", "scaled")
    np.save(tmp_path / "latents" / "broken.npy", np.zeros(3, np.float32))
    out = tmp_path / "out"
    done = fld(tmp_path / "latents", "--agreement", "--decoder", decoder, "--decoder", "taesdxl", "--out", out, *CHEAP)
    assert done.exit_code == 1 and "broken.npy" in done.output
    results = json.loads((out / "report.json").read_text())
    assert list(results["figures"]["0"]) == [decoder] and results["reference"] == "taesdxl"
    mine, theirs = (to_bytes(load_candidate(name, "cpu").decode(z, 1)) for name in (decoder, "taesdxl"))
    wanted = [peak_signal_noise_ratio(b.numpy(), a.numpy()) for a, b in zip(mine, theirs, strict=True)]
    assert results["figures"]["0"][decoder]["psnr"]["mean"] == pytest.approx(np.mean(wanted), abs=1e-4)
    assert "agreement_psnr" in results["figures"]["0"][decoder]
    assert "none of quality" in (out / "report.md").read_text()


def test_a_video_vae_is_a_candidate(tmp_path: Path) -> None:
    vae = tiny.temporal_kl()
    vae.save_pretrained(tmp_path / "vae")
    z = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        wanted = vae.decode(z / vae.config.scaling_factor, num_frames=3).sample
    assert torch.allclose(load_candidate(str(tmp_path / "vae"), "cpu").decode(z, 3), wanted, atol=1e-4)


def test_a_value_that_is_missing_is_a_gap() -> None:
    info = report.MetricInfo("psnr", "PSNR", "higher", "dB", 2)
    assert report.show({"mean": 24.0, "low": 23.5, "high": 24.7, "n": 9}, info) == "24.00 ± 0.60"
    assert report.show({"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}, info) == "-"
    assert report.show_difference({"mean": 0.5, "low": 0.2, "high": 0.8, "n": 9}, info) == "**+0.50 [+0.20, +0.80]**"
    assert report.show_difference({"mean": 0.5, "low": -0.2, "high": 0.8, "n": 9}, info) == "+0.50 [-0.20, +0.80]"
