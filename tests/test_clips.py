"""Films in and out of files, and the commands that make and take them."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fast_latent_decoders import FastDecoder, SubpixelTemporalDecoder
from fast_latent_decoders.atomic import FileError
from fast_latent_decoders.clips import read_clip, write_clip
from fast_latent_decoders.files import read_latents, write_latents
from fast_latent_decoders.networks import streaming
from fast_latent_decoders.pictures import to_bytes
from tests.test_cli import fld, names

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40], [128, 128, 128], [0, 0, 0], [255, 255, 255], [30, 200, 220]], np.uint8)


def film(height: int = 32, width: int = 64, count: int = 5) -> list[np.ndarray]:
    """Stripes of known colours, and a white spot that moves down."""
    stripes = np.repeat(np.repeat(COLOURS[None], width // 8 + 1, axis=1)[:, :width], height, axis=0)
    frames = [stripes.copy() for _ in range(count)]
    for t, frame in enumerate(frames):
        frame[4 * t : 4 * t + 4] = 255
    return frames


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("fps", [7, 23.976, 30])
def test_a_film_is_what_it_says(tmp_path: Path, suffix: str, fps: float) -> None:
    path = tmp_path / f"a{suffix}"
    assert write_clip(path, iter(film()), fps) == 5
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
        assert [round(float(frame.time) * fps) for frame in frames] == [0, 1, 2, 3, 4]
    assert {(int(frame.colorspace), int(frame.color_range)) for frame in frames} == {(1, 1)}  # BT.709, limited
    back, rate = read_clip(path)
    assert rate == pytest.approx(fps, rel=1e-3)
    places = np.arange(8) * 9 + 4  # the middle of each stripe: colours have half the resolution
    for t, (frame, written) in enumerate(zip(back, film(), strict=True)):
        row = (4 * t + 16) % 32
        assert np.abs(frame[row, places[:7]].astype(int) - written[row, places[:7]]).max() <= 8
        assert frame[4 * t + 1].mean() > 245


def test_a_gif_is_read_back_frame_by_frame(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.gif", iter(film()), 5)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (5, 200, 0)
        for t, written in enumerate(film()):
            image.seek(t)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - written).mean() < 3


def test_odd_sides(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", film(17, 33))
    assert next(read_clip(tmp_path / "a.mp4")[0]).shape == (18, 34, 3)


def test_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_clip(path, film())
    before = path.read_bytes()

    def breaking():
        yield film()[0]
        raise ValueError("the decoder failed")

    with pytest.raises(FileError, match="already there"):
        write_clip(path, film())
    with pytest.raises(ValueError, match="decoder failed"):
        write_clip(path, breaking(), force=True)
    with pytest.raises(FileError, match="no frames"):
        write_clip(tmp_path / "b.mp4", [])
    with pytest.raises(FileError, match="no frames"):
        write_clip(tmp_path / "b.gif", [])
    with pytest.raises(FileError, match=r"expected \.mp4, \.webm, \.gif"):
        write_clip(tmp_path / "b.avi", film())
    with pytest.raises(FileError, match="frames a second"):
        write_clip(tmp_path / "b.mp4", film(), 0)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.mp4"]


def test_broken_films_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no film")
    for name, said in (("empty", "is empty"), ("text", "cannot be read as a film"), ("missing", "cannot be read as a film")):
        with pytest.raises(FileError, match=said):
            read_clip(tmp_path / f"{name}.mp4")


# ---------------------------------------------------------------- commands


@pytest.fixture
def decoder(tmp_path: Path) -> str:
    torch.manual_seed(2)
    made = SubpixelTemporalDecoder((16, 8, 8), (2, 1, 1), memory=(1, 1, 0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made.save_pretrained(tmp_path / "decoder")
    return str(tmp_path / "decoder")


def test_decode_video(tmp_path: Path, decoder: str) -> None:
    """Frames are those of the whole clip, each file its own; films have the file's frames a second, or those asked for."""
    z = torch.randn(5, 4, 4, 6) * 5
    write_latents(tmp_path / "a.safetensors", z, "sd", fps=12)
    write_latents(tmp_path / "b.safetensors", z[:2], "sd")
    files, out = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "out"
    ask = ("decode", *files, "--decoder", decoder, "--dtype", "float32", "--out", out)
    fld(*ask, "--video", "frames")
    assert names(out) == [*(f"a-{i:05}.png" for i in range(5)), "b-00000.png", "b-00001.png"]
    with torch.no_grad():
        expected = FastDecoder.from_pretrained(decoder).decode(z, num_frames=5).sample
    for i, frame in enumerate(expected):
        shown = np.asarray(Image.open(out / f"a-{i:05}.png")).astype(int)
        assert np.abs(shown - to_bytes(frame)).max() <= 1
    assert "2 clips already in" in fld(*ask, "--video", "frames").stdout
    told = json.loads(fld(*ask, "--video", "mp4", "--json").stdout)
    assert [(clip["frames"], clip["fps"], clip["width"], clip["height"]) for clip in told["clips"]] == [(5, 12, 48, 32), (2, 7, 48, 32)]
    assert read_clip(out / "a.mp4")[1] == 12
    fld(*ask, "--video", "webm", "--fps", 10)
    assert read_clip(out / "a.webm")[1] == 10
    fld(*ask, "--video", "gif")
    (tmp_path / "c.safetensors").write_bytes(b"broken")
    assert "c.safetensors" in fld(*ask, tmp_path / "c.safetensors", "--video", "mp4", code=1).stderr


@pytest.mark.parametrize("family", ["taesd", "temporal"])
def test_decode_video_by_other_families(tmp_path: Path, family: str) -> None:
    from tests.pipelines import tiny

    if family == "temporal":
        tiny.decoder("temporal", "sd").save_pretrained(tmp_path / "temporal")
    write_latents(tmp_path / "a.safetensors", torch.randn(3, 4, 4, 4) * 5, "sd")
    place = family if family == "taesd" else tmp_path / "temporal"
    fld("decode", tmp_path / "a.safetensors", "--decoder", place, "--dtype", "float32", "--video", "frames", "--out", tmp_path / "out")
    fast = FastDecoder.from_pretrained(str(place), torch_dtype=torch.float32)
    with torch.no_grad():
        expected = fast.decode(torch.as_tensor(read_latents(tmp_path / "a.safetensors").tensor), num_frames=3).sample
    for i, frame in enumerate(expected):
        assert np.abs(np.asarray(Image.open(tmp_path / f"out/a-{i:05}.png")).astype(int) - to_bytes(frame)).max() <= 1


def test_encode_and_compare_films(tmp_path: Path, decoder: str) -> None:
    write_clip(tmp_path / "a.mp4", film(34, 66), 12)
    fld("encode", tmp_path / "a.mp4", "--out", tmp_path)
    latents = read_latents(tmp_path / "a.safetensors")
    assert (tuple(latents.tensor.shape), latents.latent_space, latents.units, latents.fps) == ((5, 4, 4, 8), "sd", "vae", 12)
    fld("encode", tmp_path / "a.mp4", "--out", tmp_path / "three", "--frames", 3)
    assert torch.equal(read_latents(tmp_path / "three/a.safetensors").tensor, latents.tensor[:3])
    assert "--frames asks for 9" in fld("encode", tmp_path / "a.mp4", "--out", tmp_path / "nine", "--frames", 9, code=1).stderr

    ask = ("--decoder", f"mine={decoder}", "--decoder", "taesd", "--video")
    fld("compare", tmp_path / "a.safetensors", *ask, "--out", tmp_path / "beside")
    assert names(tmp_path / "beside") == ["a.mp4", "a.png"]
    frames, rate = read_clip(tmp_path / "beside/a.mp4")
    shown = list(frames)
    assert (len(shown), rate) == (5, 12)
    source = np.stack(film(34, 66))[:, 1:33, 1:65]
    assert np.abs(shown[2][-32:, :64].astype(int) - source[2]).mean() < 20  # the source is the first of three
    assert shown[0].shape[1] > 3 * 64
    assert "already in" in fld("compare", tmp_path / "a.safetensors", *ask, "--out", tmp_path / "beside").stdout
    told = json.loads(fld("compare", tmp_path / "a.mp4", tmp_path / "a.safetensors", *ask, "--out", tmp_path / "both", "--json").stdout)
    assert (len(told["clips"]), told["decoders"], told["failed"]) == (1, ["mine", "taesd"], [])
    fld("compare", tmp_path / "a.mp4", "--decoder", "taesd", "--video", "--out", tmp_path / "film")
    write_latents(tmp_path / "b.safetensors", torch.randn(7, 4, 4, 8), "sd")
    write_clip(tmp_path / "b.mp4", film(34, 66), 12)
    assert "is not their source" in fld("compare", tmp_path / "b.safetensors", *ask, "--out", tmp_path / "b", code=1).stderr


def test_streams_are_what_the_commands_decode_by(tmp_path: Path, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long clip is never whole in memory."""
    seen: list[int] = []
    stream = streaming.SubpixelTemporalNetwork.stream

    def spy(self, z, num_frames, state=None):
        seen.append(num_frames)
        return stream(self, z, num_frames, state)

    monkeypatch.setattr(streaming.SubpixelTemporalNetwork, "stream", spy)
    write_latents(tmp_path / "a.safetensors", torch.randn(6, 4, 4, 4), "sd")
    fld("decode", tmp_path / "a.safetensors", "--decoder", decoder, "--dtype", "float32", "--video", "gif", "--out", tmp_path / "out")
    assert seen == [1] * 6
