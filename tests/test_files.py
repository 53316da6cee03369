"""Latents and pictures in files: what is read, what is written, and one sentence for everything that cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fast_latent_decoders import SD, SDXL
from fast_latent_decoders.atomic import FileError, replacing
from fast_latent_decoders.files import COMFY_SCALE, Latents, read_latents, write_latents
from fast_latent_decoders.pictures import read_picture, to_bytes, write_picture

# ---------------------------------------------------------------- latents


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(2, 4, 6, 5)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".npz", ".pt", ".pth"])
@pytest.mark.parametrize("single", [True, False])
def test_every_format_reads_single_and_batched(tmp_path: Path, z: torch.Tensor, suffix: str, single: bool) -> None:
    z = z[0] if single else z
    path = tmp_path / f"a{suffix}"
    save(path, z)
    read = read_latents(path)
    assert read.units is None and read.latent_space is None
    assert torch.equal(read.tensor, z.reshape(-1, 4, 6, 5))


def save(path: Path, z: torch.Tensor) -> None:
    if path.suffix == ".safetensors":
        save_file({"anything": z.contiguous()}, path)
    elif path.suffix == ".npy":
        np.save(path, z.numpy())
    elif path.suffix == ".npz":
        np.savez(path, anything=z.numpy())
    else:
        torch.save(z, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_float_types_become_float32(tmp_path: Path, z: torch.Tensor, dtype: torch.dtype) -> None:
    save_file({"latents": z.to(dtype)}, tmp_path / "a.safetensors")
    read = read_latents(tmp_path / "a.safetensors").tensor
    assert read.dtype == torch.float32 and torch.equal(read, z.to(dtype).float())


def test_big_endian_and_fortran_numpy(tmp_path: Path, z: torch.Tensor) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(z.numpy().astype(">f4")))
    assert torch.equal(read_latents(tmp_path / "a.npy").tensor, z)


def test_metadata_is_written_and_obeyed(tmp_path: Path, z: torch.Tensor) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, z, "sd", "scaled")
    read = read_latents(path)
    assert (read.units, read.latent_space) == ("scaled", "sd")
    assert torch.equal(read.in_vae_units(SD), z / SD.scaling_factor)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_metadata_beside_the_tensor_in_pt_and_npz(tmp_path: Path, z: torch.Tensor) -> None:
    torch.save({"samples": z, "units": "vae", "latent_space": "sdxl", "seed": torch.zeros(3)}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", samples=z.numpy(), units="vae", latent_space="sdxl", seed=np.zeros(3))
    for path in (tmp_path / "a.pt", tmp_path / "a.npz"):
        read = read_latents(path)
        assert (read.units, read.latent_space) == ("vae", "sdxl") and torch.equal(read.tensor, z)


def test_comfy_new_files_are_vae_units_and_old_ones_are_scaled(tmp_path: Path, z: torch.Tensor) -> None:
    save_file({"latent_tensor": z, "latent_format_version_0": torch.tensor([])}, tmp_path / "new.latent")
    save_file({"latent_tensor": z}, tmp_path / "old.latent")
    new, old = read_latents(tmp_path / "new.latent"), read_latents(tmp_path / "old.latent")
    assert new.units == old.units == "vae"
    assert torch.equal(new.tensor, z)
    assert torch.equal(old.tensor, z * COMFY_SCALE)


def test_units_without_metadata() -> None:
    scaled = torch.randn(1, 4, 32, 32)
    vae = scaled / SDXL.scaling_factor
    assert torch.equal(Latents(vae).in_vae_units(SDXL), vae)
    assert torch.equal(Latents(scaled).in_vae_units(SDXL, scaled=True), vae)
    assert Latents(vae).doubt(SDXL) is None
    assert Latents(scaled).doubt(SDXL, scaled=True) is None
    assert "try with --scaled" in (Latents(scaled).doubt(SDXL) or "")
    assert "try without --scaled" in (Latents(vae).doubt(SDXL, scaled=True) or "")
    assert Latents(scaled, "vae").doubt(SDXL) is None, "a file that tells its units is believed"


BAD = {
    "no suffix": ("a", lambda p: p.write_bytes(b"x"), "not a latent file"),
    "other suffix": ("a.txt", lambda p: p.write_bytes(b"x"), "not a latent file"),
    "missing": ("a.npy", lambda p: None, "No such file"),
    "folder": ("a.npy", lambda p: p.mkdir(), "directory"),
    "empty": ("a.safetensors", lambda p: p.touch(), "is empty"),
    "empty npy": ("a.npy", lambda p: p.touch(), "is empty"),
    "garbage": ("a.safetensors", lambda p: p.write_bytes(b"\xff" * 99), "not a whole .safetensors file"),
    "garbage latent": ("a.latent", lambda p: p.write_bytes(b"\0" * 99), "not a whole .latent file"),
    "garbage npy": ("a.npy", lambda p: p.write_bytes(b"\xff" * 99), "not a whole .npy file"),
    "garbage npz": ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04" + b"\xff" * 99), "not a whole .npz file"),
    "garbage pt": ("a.pt", lambda p: p.write_bytes(b"\xff" * 99), "not a whole .pt file"),
    "truncated": ("a.safetensors", lambda p: cut(p), "not a whole"),
    "truncated npy": ("a.npy", lambda p: cut(p), "not a whole"),
    "truncated npz": ("a.npz", lambda p: cut(p), "not a whole"),
    "truncated pt": ("a.pt", lambda p: cut(p), "not a whole"),
    "pickled npy": ("a.npy", lambda p: np.save(p, np.array([{"a": 1}], dtype=object), allow_pickle=True), "plain tensors"),
    "pickled pt": ("a.pt", lambda p: torch.save({"latents": Path("x")}, p), "plain tensors"),
    "list": ("a.pt", lambda p: torch.save([torch.zeros(4, 8, 8)], p), "holds a list"),
    "no tensor": ("a.pt", lambda p: torch.save({"a": 1}, p), "holds no tensor"),
    "no array": ("a.npz", lambda p: np.savez(p), "holds no tensor"),
    "several": ("a.npz", lambda p: np.savez(p, a=np.zeros((4, 8, 8)), b=np.zeros((4, 8, 8))), "holds 2 tensors (a, b)"),
    "2-d": ("a.npy", lambda p: np.save(p, np.zeros((8, 8))), "shape (8, 8): expected latents (C, h, w)"),
    "clip": ("a.npy", lambda p: np.save(p, np.zeros((1, 2, 4, 8, 8))), "save a clip's frames as (frames, C, h, w)"),
    "no latents": ("a.npy", lambda p: np.save(p, np.zeros((0, 4, 8, 8))), "shape (0, 4, 8, 8)"),
    "integers": ("a.npy", lambda p: np.save(p, np.zeros((4, 8, 8), int)), "holds int64 values"),
    "complex": ("a.pt", lambda p: torch.save(torch.zeros(4, 8, 8, dtype=torch.complex64), p), "holds complex64 values"),
    "nan": ("a.npy", lambda p: np.save(p, np.full((4, 8, 8), np.nan)), "256 of 256 values that are NaN or infinite"),
    "inf": ("a.npy", lambda p: np.save(p, np.full((4, 8, 8), 1e300)), "NaN or infinite"),
    "units": ("a.safetensors", lambda p: save_file({"z": torch.zeros(4, 8, 8)}, p, {"units": "mm"}), "units are 'mm'"),
}


def cut(path: Path) -> None:
    save(path, torch.randn(4, 16, 16))
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, case: str) -> None:
    name, make, expected = BAD[case]
    path = tmp_path / name
    make(path)
    with pytest.raises(FileError) as caught:
        read_latents(path)
    said = str(caught.value)
    assert expected in said and str(path) in said and "\n" not in said


def test_write_latents_refuses(tmp_path: Path, z: torch.Tensor) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, z, "sdxl")
    before = path.read_bytes()
    with pytest.raises(FileError, match="already there"):
        write_latents(path, z * 2, "sdxl")
    assert path.read_bytes() == before
    write_latents(path, z * 2, "sdxl", force=True)
    assert torch.equal(read_latents(path).tensor, z * 2)
    with pytest.raises(FileError, match="suffix"):
        write_latents(tmp_path / "a.npy", z, "sdxl")
    with pytest.raises(FileError, match="NaN"):
        write_latents(tmp_path / "b.safetensors", z / 0 * 0, "sdxl")
    with pytest.raises(FileError, match="cannot be written"):
        write_latents(tmp_path / "none" / "b.safetensors", z, "sdxl")


def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(FileError, match="No space left"), replacing(path, force=True) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), replacing(path, force=True) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- pictures


def test_rounding_and_clamping() -> None:
    values = torch.tensor([-9.0, -1.0, -0.997, 0.0, 0.5, 1.0, 9.0])
    made = to_bytes(values.expand(3, 1, 7))[0, :, 0]
    assert made.tolist() == [0, 0, 0, 128, 191, 255, 255]
    every = torch.arange(256) / 127.5 - 1
    assert to_bytes(every.expand(3, 1, 256))[0, :, 0].tolist() == list(range(256))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_pictures_come_back(tmp_path: Path, suffix: str) -> None:
    smooth = torch.linspace(-1, 1, 32).expand(3, 24, 32)
    path = tmp_path / f"a{suffix}"
    write_picture(path, smooth.half())
    read = read_picture(path)
    assert read.tensor.shape == (3, 24, 32) and read.note is None
    assert (read.tensor - smooth).abs().max() < (0.005 if suffix.lower() == ".png" else 0.1)
    with pytest.raises(FileError, match="already there"):
        write_picture(path, smooth)


def picture_in(tmp_path: Path, image: Image.Image, suffix: str = ".png", **options: object) -> torch.Tensor:
    image.save(tmp_path / f"in{suffix}", **options)
    return read_picture(tmp_path / f"in{suffix}").tensor


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_white_is_white_in_every_mode(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (16, 8), 65535 if mode == "I;16" else "white")
    assert torch.equal(picture_in(tmp_path, image), torch.ones(3, 8, 16))


def test_16_bits_are_divided_not_clipped(tmp_path: Path) -> None:
    read = picture_in(tmp_path, Image.fromarray(np.full((8, 8), 32768, np.uint16)))
    assert read.mean().item() == pytest.approx(0, abs=1e-4)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    assert torch.equal(picture_in(tmp_path, Image.new("RGBA", (8, 8), (255, 0, 0, 0))), torch.ones(3, 8, 8))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    assert torch.equal(picture_in(tmp_path, palette, transparency=0), torch.ones(3, 8, 8))


def test_cmyk(tmp_path: Path) -> None:
    read = picture_in(tmp_path, Image.new("CMYK", (16, 16), (0, 0, 0, 0)), ".jpg")
    assert read.min() > 0.95


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert picture_in(tmp_path, Image.new("RGB", (32, 16)), ".jpg", exif=exif).shape == (3, 32, 16)


def test_crop_is_central_and_told(tmp_path: Path) -> None:
    values = np.zeros((19, 8, 3), np.uint8)
    values[1:17] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png")
    assert torch.equal(read.tensor, torch.ones(3, 16, 8))
    assert read.note == "cropped from 8x19 to 8x16, multiples of 8"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.png", b"", "is empty"),
        ("a.png", b"not a picture", "not a picture that Pillow can read"),
        ("missing.png", None, "No such file"),
    ],
)
def test_bad_pictures(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=expected):
        read_picture(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tif"])
def test_truncated_pictures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FileError) as caught:
        read_picture(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_too_small_and_32_bit_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="7x9; expected sides of at least 8"):
        picture_in(tmp_path, Image.new("RGB", (7, 9)))
    with pytest.raises(FileError, match="32-bit"):
        picture_in(tmp_path, Image.new("F", (8, 8), 0.5), ".tif")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="NaN or infinite"):
        write_picture(tmp_path / "a.png", torch.full((3, 8, 8), float("nan")))
    with pytest.raises(FileError, match="known picture suffix"):
        write_picture(tmp_path / "a.txt", torch.zeros(3, 8, 8))
    with pytest.raises(FileError, match="cannot be written"):
        write_picture(tmp_path / "a.webp", torch.zeros(3, 8, 16400))
    assert not list(tmp_path.iterdir())


def test_flat_pictures_raise_no_doubt() -> None:
    flat = torch.tensor([-0.4, 0.6, 0.5, -0.4])[:, None, None].expand(1, 4, 8, 8)  # scaled; no spread within a channel
    assert Latents(flat / SDXL.scaling_factor).doubt(SDXL) is None
    assert Latents(torch.zeros(1, 4, 8, 8)).doubt(SDXL) is None
