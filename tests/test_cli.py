"""`fld`: what it writes, what it says, and its exit codes (0 all done, 1 some inputs failed, 2 wrong usage)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from fast_latent_decoders import FastDecoder, SubpixelDecoder, TAEDecoder
from fast_latent_decoders.cli import app
from fast_latent_decoders.files import read_latents, write_latents
from fast_latent_decoders.pictures import to_bytes


@pytest.fixture(scope="module")
def sd_decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("sd")
    SubpixelDecoder(widths=(16, 8, 8), blocks=(1, 1, 1), convs=1, latent_space="sd").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Three files, four latents, two shapes."""
    folder = tmp_path / "latents"
    folder.mkdir()
    write_latents(folder / "a.safetensors", torch.randn(4, 4, 6) * 6, "sdxl")
    np.save(folder / "b.npy", torch.randn(2, 4, 4, 6).numpy() * 6)
    save_file({"latent_tensor": torch.randn(1, 4, 5, 5) * 6, "latent_format_version_0": torch.tensor([])}, folder / "c.latent")
    (folder / "notes.txt").write_text("not an input")
    return folder


def fld(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), "a traceback"
    return result


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_decode(tmp_path: Path, decoder: str, latents: Path, batch_size: int) -> None:
    out = tmp_path / "out"
    result = fld("decode", latents, "--decoder", decoder, "--out", out, "--dtype", "float32", "--batch-size", batch_size)
    assert names(out) == ["a.png", "b-0.png", "b-1.png", "c.png"]
    assert f"4 pictures in {out}/" in result.stdout
    assert f"{latents / 'a.safetensors'} -> {out / 'a.png'}" in result.stdout
    z = read_latents(latents / "b.npy").tensor[1:]
    with torch.no_grad():
        expected = to_bytes(FastDecoder.from_pretrained(decoder).decode(z).sample[0])
    made = np.asarray(Image.open(out / "b-1.png"))
    assert np.abs(made.astype(int) - expected).max() <= 1  # channels_last may round the other way


def test_decode_again_skips_and_force_replaces(tmp_path: Path, decoder: str, latents: Path) -> None:
    words = ("decode", latents, "--decoder", decoder, "--out", tmp_path / "out")
    fld(*words)
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    (tmp_path / "out" / "c.png").unlink()
    assert f"1 picture in {tmp_path / 'out'}/ (3 more already there; --force replaces them)" in fld(*words).stdout
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"
    assert f"4 pictures already in {tmp_path / 'out'}/" in fld(*words).stdout
    fld(*words, "--force")
    assert Image.open(tmp_path / "out" / "a.png").size == (48, 32)


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_decode_formats(tmp_path: Path, decoder: str, latents: Path, name: str, kind: str) -> None:
    fld("decode", latents / "a.safetensors", "--decoder", decoder, "--out", tmp_path / "deep" / "out", "--format", name)
    assert Image.open(tmp_path / "deep" / "out" / f"a.{name}").format == kind


def test_decode_json(tmp_path: Path, decoder: str, latents: Path) -> None:
    (latents / "d.npy").touch()
    words = ("decode", latents, "--decoder", decoder, "--out", tmp_path / "out", "--dtype", "float32", "--device", "cpu")
    said = json.loads(fld(*words, "--json", code=1).stdout)
    assert (said["device"], said["dtype"], said["latent_space"], len(said["pictures"])) == ("cpu", "float32", "sdxl", 4)
    assert said["pictures"][0].keys() == {"input", "output", "width", "height", "seconds"}
    assert [failure["input"] for failure in said["failed"]] == [str(latents / "d.npy")]
    assert len(json.loads(fld(*words, "--json", code=1).stdout)["skipped"]) == 4


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_decode_dtypes(tmp_path: Path, decoder: str, latents: Path, dtype: str) -> None:
    fld("decode", latents, "--decoder", decoder, "--out", tmp_path / "out", "--dtype", dtype)
    assert len(names(tmp_path / "out")) == 4


def test_decode_tiles_are_exact(tmp_path: Path, decoder: str) -> None:
    write_latents(tmp_path / "a.safetensors", torch.randn(4, 4, 150) * 6, "sdxl")
    words = ("decode", tmp_path / "a.safetensors", "--decoder", decoder, "--dtype", "float32")
    fld(*words, "--out", tmp_path / "whole")
    fld(*words, "--out", tmp_path / "tiled", "--tile")
    whole, tiled = (np.asarray(Image.open(tmp_path / name / "a.png")).astype(int) for name in ("whole", "tiled"))
    assert np.abs(whole - tiled).max() <= 1


def test_failures_are_named_and_the_others_done(tmp_path: Path, decoder: str, latents: Path) -> None:
    np.save(latents / "channels.npy", torch.randn(16, 4, 4).numpy())
    np.save(latents / "nan.npy", np.full((4, 4, 4), np.nan))
    (latents / "cut.safetensors").write_bytes((latents / "a.safetensors").read_bytes()[:-9])
    write_latents(latents / "other.safetensors", torch.randn(4, 4, 4), "sd")
    words = (latents, latents / "missing.npy", "--decoder", decoder, "--out", tmp_path / "out")
    result = fld("decode", *words, code=1)
    assert names(tmp_path / "out") == ["a.png", "b-0.png", "b-1.png", "c.png"]
    said = result.stderr
    assert f"{latents / 'channels.npy'} has latents of 16 channels" in said and "expects 4" in said
    assert f"{latents / 'nan.npy'} has 64 of 64 values that are NaN" in said
    assert f"{latents / 'cut.safetensors'} is not a whole .safetensors file" in said
    assert f"{latents / 'other.safetensors'} holds 'sd' latents and the decoder is for 'sdxl'; decoders that fit: " in said
    assert "taesd" in said.split("decoders that fit: ")[1]
    assert f"{latents / 'missing.npy'} does not exist" in said
    assert "5 inputs failed" in result.stdout


def test_units_in_doubt_name_the_flag(tmp_path: Path, decoder: str) -> None:
    np.save(tmp_path / "a.npy", torch.randn(4, 16, 16).numpy())
    words = ("decode", tmp_path / "a.npy", "--decoder", decoder)
    assert "try with --scaled" in fld(*words, "--out", tmp_path / "vae").stderr
    assert fld(*words, "--out", tmp_path / "scaled", "--scaled").stderr == ""
    assert (tmp_path / "vae" / "a.png").read_bytes() != (tmp_path / "scaled" / "a.png").read_bytes()


def test_two_inputs_may_not_share_an_output(tmp_path: Path, decoder: str, latents: Path) -> None:
    np.save(latents / "a.npy", torch.randn(4, 4, 4).numpy() * 6)
    words = ("decode", latents, latents / "a.npy", "--decoder", decoder, "--out", tmp_path / "out")
    said = fld(*words, code=1).stderr
    assert f"{latents / 'a.safetensors'} and {latents / 'a.npy'} would both be written to {tmp_path / 'out' / 'a.png'}" in said
    assert len(names(tmp_path / "out")) == 4


def test_empty_folder_and_hidden_files(tmp_path: Path, decoder: str) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / ".hidden.npy", np.zeros((4, 4, 4)))
    assert f"{tmp_path / 'in'} holds no latent file" in fld("decode", tmp_path / "in", "--decoder", decoder, code=1).stderr


def test_unusable_output_folders(tmp_path: Path, decoder: str, latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    words = ("decode", latents, "--decoder", decoder, "--out")
    assert "cannot write to the folder" in fld(*words, tmp_path / "file", code=1).stderr
    assert "cannot write to the folder" in fld(*words, tmp_path / "file" / "out", code=1).stderr

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    said = fld(*words, tmp_path / "out", code=1).stderr
    assert said.count("cannot be written: No space left on device") == 4
    assert not names(tmp_path / "out")


def test_out_of_memory_says_what_to_try(tmp_path: Path, decoder: str, latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(FastDecoder, "decode", no_memory)
    assert "try --tile" in fld("decode", latents, "--decoder", decoder, "--out", tmp_path / "out", code=1).stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--decoder", "subpixel-sdx"], "subpixel-sdxl"),
        (["--decoder", "/nowhere/at/all"], "--decoder /nowhere/at/all: there is no such folder"),
        (["--device", "quantum"], "quantum"),
        (["--batch-size", "0"], "batch-size"),
        (["--format", "bmp"], "bmp"),
    ],
)
def test_wrong_usage(tmp_path: Path, latents: Path, words: list[str], expected: str) -> None:
    assert expected in fld("decode", latents, "--out", tmp_path / "out", *words, code=2).stderr


def test_a_broken_decoder_folder_is_wrong_usage(tmp_path: Path, decoder: str, latents: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((Path(decoder) / "config.json").read_text())
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 99)
    assert "--decoder" in fld("decode", latents, "--decoder", broken, "--out", tmp_path / "out", code=2).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has cuda")
def test_missing_device_is_wrong_usage(tmp_path: Path, decoder: str, latents: Path) -> None:
    said = fld("decode", latents, "--decoder", decoder, "--device", "cuda", "--out", tmp_path / "out", code=2).stderr
    assert "try --device auto" in said


# ---------------------------------------------------------------- list, encode


def test_list() -> None:
    rows = json.loads(fld("list", "--json").stdout)
    assert {"subpixel-sdxl", "taesdxl", "taesd"} <= {row["name"] for row in rows}
    taesd = next(row for row in rows if row["name"] == "taesd")
    assert (taesd["latent_space"], taesd["parameters"], taesd["licence"]) == ("sd", 1222531, "MIT")
    assert "taesdxl" in fld("list").stdout


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(folder / "one.png")
    Image.fromarray(rng.integers(0, 255, (41, 40), np.uint8)).save(folder / "two.jpg")
    return folder


@pytest.mark.parametrize("space", ["sdxl", "sd"])
def test_encode_and_decode(tmp_path: Path, decoder: str, sd_decoder: str, pictures: Path, space: str) -> None:
    out = tmp_path / "latents"
    (pictures / "bad.png").write_bytes(b"no picture")
    result = fld("encode", pictures, "--latent-space", space, "--out", out, code=1)
    assert "bad.png is not a picture" in result.stderr and "cropped from 40x41 to 40x40" in result.stderr
    assert f"2 latent files in {out}/" in result.stdout
    read = read_latents(out / "one.safetensors")
    assert (read.units, read.latent_space, tuple(read.tensor.shape)) == ("vae", space, (1, 4, 4, 6))
    assert "2 latent files already in" in fld("encode", pictures, "--latent-space", space, "--out", out, code=1).stdout
    fld("decode", out, "--decoder", sd_decoder if space == "sd" else decoder, "--out", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "one.png").size == (48, 32)


def test_encode_wrong_usage(tmp_path: Path, decoder: str, pictures: Path) -> None:
    words = ("encode", pictures, "--out", tmp_path / "latents")
    assert "leave one of them out" in fld(*words, "--decoder", decoder, "--latent-space", "sd", code=2).stderr
    assert "there are sdxl and sd" in fld(*words, "--latent-space", "flux", code=2).stderr


def test_encode_without_an_encoder_fails_each(tmp_path: Path, pictures: Path) -> None:
    SubpixelDecoder(widths=(8, 8, 8), blocks=(1, 1, 1), convs=1, encoder="none").save_pretrained(tmp_path / "d")
    said = fld("encode", pictures, "--decoder", tmp_path / "d", "--out", tmp_path / "latents", code=1).stderr
    assert "one.png" in said and "encoder" in said


# ---------------------------------------------------------------- compare


def test_compare(tmp_path: Path, decoder: str, pictures: Path) -> None:
    pytest.importorskip("skimage")
    sheet = tmp_path / "deep" / "sheet.png"
    words = ("compare", pictures, "--decoder", f"mine={decoder}", "--decoder", "taesdxl", "--out", sheet)
    result = fld(*words)
    assert f"2 pictures by 2 decoders in {sheet}" in result.stdout and "mean" in result.stdout
    said = json.loads(fld(*words, "--json").stdout)
    assert [row["name"] for row in said["pictures"]] == ["one", "two"]
    first = said["pictures"][0]["figures"]
    assert first.keys() == {"mine", "taesdxl"} and first["taesdxl"]["psnr"] > 5 and 0 < first["taesdxl"]["ssim"] < 1
    assert "stays as it is" in fld(*words).stderr
    width, height = Image.open(sheet).size
    assert width > 2 * 640 and height > 3 * 320


def test_compare_latents_takes_the_picture_beside_or_given_as_source(tmp_path: Path, pictures: Path) -> None:
    fld("encode", pictures, "--out", tmp_path / "latents")
    write_latents(tmp_path / "latents" / "lone.safetensors", torch.randn(2, 4, 4, 4) * 6, "sdxl")
    words = ("compare", tmp_path / "latents", "--decoder", "taesdxl", "--json", "--out", tmp_path / "sheet.webp", "--force")
    assert not any(row["figures"] for row in json.loads(fld(*words).stdout)["pictures"])
    given = json.loads(fld(*words, pictures).stdout)["pictures"]
    for file in pictures.iterdir():
        file.rename(tmp_path / "latents" / file.name)
    assert json.loads(fld(*words).stdout)["pictures"] == given
    assert [(row["name"], bool(row["figures"])) for row in given] == [
        ("lone-0", False),
        ("lone-1", False),
        ("one", True),
        ("two", True),
    ]


def test_compare_failures(tmp_path: Path, sd_decoder: str, latents: Path, pictures: Path) -> None:
    said = fld("compare", latents, "--decoder", sd_decoder, "--out", tmp_path / "sheet.png", code=1).stderr
    assert "holds 'sdxl' latents and the decoder is for 'sd'" in said
    assert (tmp_path / "sheet.png").exists()
    assert "expected a file ending in" in fld("compare", pictures, "--out", tmp_path / "sheet.txt", code=2).stderr
    for wrong, reason in (("a=", "expected a preset"), ("=taesd", "expected a preset"), ("taesd=taesdxl", "is taesd and taesdxl")):
        assert reason in fld("compare", pictures, "--decoder", "taesd", "--decoder", wrong, "--out", tmp_path / "x.png", code=2).stderr


def test_compare_without_scikit_image(tmp_path: Path, decoder: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage.metrics", None)
    result = fld("compare", pictures, "--decoder", decoder, "--out", tmp_path / "sheet.png")
    assert "fast-latent-decoders[eval]" in result.stderr and "dB" in result.stdout


# ---------------------------------------------------------------- convert


def test_convert_round_trip(tmp_path: Path) -> None:
    TAEDecoder(width=8).save_pretrained(tmp_path / "ours")
    fld("convert", tmp_path / "ours", tmp_path / "tiny", "--to", "autoencoder-tiny")
    fld("convert", tmp_path / "ours", tmp_path / "deep" / "taesd.safetensors", "--to", "taesd")
    for source in (tmp_path / "tiny", tmp_path / "deep" / "taesd.safetensors"):
        back = tmp_path / f"back-{source.stem}"
        assert f"{source} -> {back}" in fld("convert", source, back, "--latent-space", "sdxl").stdout
        assert names(back) == ["config.json", "diffusion_pytorch_model.safetensors"]
        weights = (folder / "diffusion_pytorch_model.safetensors" for folder in (back, tmp_path / "ours"))
        assert len({file.read_bytes() for file in weights}) == 1


def test_convert_never_overwrites_unasked_nor_loses_other_files(tmp_path: Path) -> None:
    TAEDecoder(width=8).save_pretrained(tmp_path / "ours")
    words = ("convert", tmp_path / "ours", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    fld(*words)
    (tmp_path / "out" / "config.json").write_text("mine")
    assert "already there" in fld(*words).stdout
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    fld(*words, "--force")
    assert (tmp_path / "out" / "config.json").read_text() != "mine"
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_convert_failures(tmp_path: Path, decoder: str) -> None:
    TAEDecoder(width=8).save_pretrained(tmp_path / "ours")
    fld("convert", tmp_path / "ours", tmp_path / "a.safetensors", "--to", "taesd")
    assert "pass --latent-space" in fld("convert", tmp_path / "a.safetensors", tmp_path / "out", code=2).stderr
    assert "suffix .safetensors" in fld("convert", tmp_path / "ours", tmp_path / "out", "--to", "taesd", code=2).stderr
    assert "writes a folder" in fld("convert", tmp_path / "ours", tmp_path / "a.safetensors", code=2).stderr
    assert "does not exist" in fld("convert", tmp_path / "none", tmp_path / "out", code=1).stderr
    assert "SubpixelDecoder" in fld("convert", decoder, tmp_path / "out", code=1).stderr
    said = fld("convert", tmp_path / "ours", tmp_path / "out", "--latent-space", "sd", code=1).stderr
    assert "is for 'sdxl', not --latent-space sd" in said
    (tmp_path / "ours" / "config.json").write_text("{")
    assert str(tmp_path / "ours") in fld("convert", tmp_path / "ours", tmp_path / "out", code=1).stderr
    assert not (tmp_path / "out").exists()
