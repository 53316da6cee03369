"""The trainer's data layer: what is read, what is skipped, and that nothing depends on who does it."""

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fast_latent_decoders.evaluation import reading

from .samples import clip, crops, encoded, keys, picture, shard, source, stage
from .tiny import SHARED, module, needs_shared

# ---------------------------------------------------------------- what is read


def test_shards_and_folders_give_crops(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"0.jpg": picture(60, format="JPEG"), "0.json": {"width": 64, "height": 48}, "0.txt": b"words"})
    (tmp_path / "folder/deep").mkdir(parents=True)
    (tmp_path / "folder/deep/b.webp").write_bytes(picture(200, format="WEBP"))
    found = crops([source(tmp_path / "{a,b}.tar"), source(tmp_path / "folder")], count=12, colour=0.0)
    means = {round(item.target.float().mean().item(), -1) for item in found}
    assert means == {60, 200}
    item = found[0]
    assert (item.target.shape, item.target.dtype) == ((1, 3, 32, 32), torch.uint8)
    assert (item.mask.shape, item.mask.dtype, bool(item.mask.any())) == ((1, 1, 32, 32), torch.bool, False)
    assert item.skipped == []


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def test_every_kind_of_picture_becomes_upright_rgb() -> None:
    read = reading.read_picture
    grey = Image.fromarray(np.full((20, 30), 77, np.uint8))
    deep = Image.fromarray(np.full((20, 30), 77 * 257, np.uint16))
    clear = Image.fromarray(np.zeros((20, 30, 4), np.uint8))
    ink = Image.fromarray(np.full((20, 30, 3), (255, 0, 0), np.uint8)).convert("CMYK")
    indexed = Image.fromarray(np.full((20, 30, 3), (0, 0, 255), np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE)
    for image, format, expected in (
        (grey, "JPEG", (77, 77, 77)),
        (deep, "PNG", (77, 77, 77)),
        (clear, "PNG", (255, 255, 255)),
        (ink, "JPEG", (254, 0, 0)),
        (indexed, "PNG", (0, 0, 255)),
        (grey.convert("LA"), "PNG", (77, 77, 77)),
        (grey.convert("1"), "PNG", (0, 0, 0)),
    ):
        values = read(encoded(image, format))
        assert (values.shape, values.dtype) == ((1, 3, 20, 30), torch.uint8), image.mode
        if image.mode != "1":
            assert values[0, :, 10, 10].tolist() == pytest.approx(expected, abs=2), image.mode
    sideways = Image.new("RGB", (30, 20))
    sideways.putpixel((0, 0), (255, 255, 255))
    upright = read(encoded(sideways, "PNG", exif=exif(6)))  # turned by a quarter: the first pixel comes to the upper right
    assert upright.shape == (1, 3, 30, 20)
    assert upright[0, 0, 0, 19] == 255


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx"), ("mov", "mpeg4")])
def test_clips_give_consecutive_frames_at_one_stride(suffix: str, codec: str, tmp_path: Path) -> None:
    path = clip(tmp_path / f"a.{suffix}", frames=40, codec=codec)
    strides = set()
    for item in crops([source(path, kind="clips")], clips=True, frames=8, stride=3, count=16, colour=0.0, reduce=1.0):
        assert item.target.shape == (8, 3, 32, 32)
        values = item.target.float().mean(dim=(1, 2, 3))
        steps = (values.diff() / 4).round()
        assert len(steps.unique()) == 1, values
        strides.add(int(steps[0]))
    assert strides == {1, 2, 3}


def test_the_stride_is_limited_so_that_a_short_clip_suffices(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", frames=9)
    found = crops([source(path, kind="clips")], clips=True, frames=8, stride=3, count=4, colour=0.0)
    assert [item.skipped for item in found] == [[]] * 4
    with pytest.raises(ValueError, match=r"cannot be used: 100 are corrupt.* it has 9 frames and 10 are needed"):
        crops([source(path, kind="clips")], clips=True, frames=10)[0]


def test_windows_far_into_a_clip_are_the_frames_that_counting_finds(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", frames=50, level=None)
    long = tmp_path / "long.mp4"
    av = pytest.importorskip("av")
    with av.open(str(long), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for i in range(200):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), i, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    for start in (0, 60, 61, 100, 192):
        with long.open("rb") as file:
            values = reading.read_clip(file, 8, lambda total, start=start: (start, 1)).float().mean(dim=(1, 2, 3))
        assert (values - torch.arange(start, start + 8)).abs().max() < 2, start
    with long.open("rb") as file:  # as if the header had promised more frames than there are
        assert reading.read_clip(file, 8, lambda total: (total - 3, 1)).float().mean(dim=(1, 2, 3)).tolist() == pytest.approx(
            range(8), abs=2
        )


# ---------------------------------------------------------------- what is not


def test_corrupt_samples_are_skipped_and_named(tmp_path: Path) -> None:
    whole = picture(90, format="JPEG")
    members = {"good.jpg": whole, "nothing.jpg": b"", "text.jpg": b"hello", "half.jpg": whole[: len(whole) * 3 // 4]}
    found = crops([source(shard(tmp_path / "a.tar", members))], count=30)
    batch = module("data").collate(list(found))
    assert batch.target.shape == (30, 1, 3, 32, 32)
    named = Counter(line.split(": ")[0] for line in batch.skipped)
    assert set(named) == {f"a.tar:{key}" for key in ("nothing", "text", "half")}
    assert any("truncated" in line.lower() for line in batch.skipped), batch.skipped


def test_a_truncated_clip_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    whole = clip(tmp_path / "clips/good.mp4").read_bytes()
    (tmp_path / "clips/bad.mp4").write_bytes(whole[: len(whole) // 2])
    found = list(crops([source(tmp_path / "clips", kind="clips")], clips=True, count=8, stride=1))
    assert all("bad.mp4: " in line for item in found for line in item.skipped)
    assert any(item.skipped for item in found)


def test_a_source_of_which_nothing_can_be_used_says_why(tmp_path: Path) -> None:
    bad = source(shard(tmp_path / "a.tar", {"x.jpg": b"hello"}))
    with pytest.raises(
        ValueError, match=r"100 samples of .*a.tar in a row cannot be used: 100 are corrupt.*a.tar:x: no picture that Pillow"
    ):
        crops([bad])[0]
    small = source(shard(tmp_path / "b.tar", {"x.png": picture()}))
    with pytest.raises(ValueError, match="0 are corrupt, 1000 smaller than 128 px"):
        crops([small], crop=128)[0]


def test_empty_and_cut_off_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard(tmp_path / "a-empty.tar", {})
    (tmp_path / "a-nothing.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no pictures: expected files or tar members KEY.jpg"):
        keys([source(tmp_path / "a-*.tar")])
    assert "a-nothing.tar is no whole, uncompressed tar" in caplog.text
    whole = shard(tmp_path / "b.tar", {f"{i}.png": picture(i) for i in range(3)}).read_bytes()
    (tmp_path / "a-cut.tar").write_bytes(whole[:8000])
    found = crops([source(tmp_path / "a-*.tar")], count=20)
    assert any("the shard ends after" in line for item in found for line in item.skipped)


def test_paths_that_match_nothing_and_filters_that_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none-\*.tar matches no file or folder"):
        keys([source(tmp_path / "none-*.tar")])
    tar = shard(tmp_path / "a.tar", {"0.png": picture(), "0.json": {"width": 64, "height": 48, "aesthetic": 5}})
    for filters, name in (
        ({"min_size": 64}, "min_size 64"),
        ({"aesthetic": (6, 7)}, r"aesthetic 6 to 7"),
        ({"faces": True}, "faces"),
        ({"classes": ["Archery"]}, r"classes \['Archery'\]"),
    ):
        with pytest.raises(ValueError, match=rf"leave none of the pictures of .*a.tar: {name} left out 1"):
            keys([source(tar, **filters)])
    with pytest.raises(FileNotFoundError, match=r"list of names .*none.txt cannot be read"):
        keys([source(tar, names=str(tmp_path / "none.txt"))])
    with pytest.raises(ValueError, match="expected a source of clips"):
        keys([source(tar)], "clips")


def test_broken_metadata_leave_a_sample_out_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken: list[Any] = [b"{", b"\xff", b"[1]", {"width": "wide"}, {"boxes": [1, 2, 3]}, {"boxes": "["}]
    members = {f"{i}.{suffix}": data for i, text in enumerate(broken) for suffix, data in (("png", picture()), ("json", text))}
    assert keys([source(shard(tmp_path / "a.tar", {**members, "good.png": picture()}))]) == ["good"]
    assert "6 samples are left out, their metadata cannot be read" in caplog.text


# ---------------------------------------------------------------- filters and weights


def test_filters(tmp_path: Path) -> None:
    told = [
        {"aesthetic": 2.9},
        {"AESTHETIC_SCORE": 3.0, "width": 512, "height": 300},
        {"aesthetic_score": 6.0, "face": True},
        {"aesthetic": 8.4, "face": False, "width": 256, "height": 256},
        {"aesthetic": None, "boxes": [[0, 0, 9, 9]]},
        {"boxes": [], "class": "street"},
    ]
    tar = shard(
        tmp_path / "a.tar", {f"{i}.{s}": d for i, m in enumerate(told) for s, d in (("json", m), ("png", picture()))}
    )  # fmt: skip
    for filters, kept in (
        ({}, "012345"),
        ({"aesthetic": (3, 6)}, "12"),
        ({"aesthetic": (8, 10)}, "3"),
        ({"faces": True}, "24"),
        ({"min_size": 300}, "01245"),  # where the metadata do not say, decoding will tell
        ({"classes": ["street"]}, "5"),
    ):
        assert keys([source(tar, **filters)]) == list(kept), filters


def test_names_of_ucf101_and_classes_by_folder(tmp_path: Path) -> None:
    for name in ("Archery/v_Archery_g08_c01", "Archery/v_Archery_g01_c01", "Lunges/v_Lunges_g09_c02"):
        path = tmp_path / "UCF-101" / f"{name}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 3\r\nLunges/v_Lunges_g09_c02.avi 52\n")
    (tmp_path / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    folder, train = tmp_path / "UCF-101", str(tmp_path / "trainlist01.txt")
    assert keys([source(folder, kind="clips", names=train)], "clips") == ["v_Archery_g08_c01", "v_Lunges_g09_c02"]
    assert keys([source(folder, kind="clips", names=str(tmp_path / "testlist01.txt"))], "clips") == ["v_Archery_g01_c01"]
    assert keys([source(folder, kind="clips", classes=["Lunges"])], "clips") == ["v_Lunges_g09_c02"]
    packed = {"one.mp4": b"", "one.json": {"file": "x/v_Archery_g08_c01.avi"}, "v_Lunges_g09_c02.avi": b"", "two.mp4": b""}
    assert keys([source(shard(tmp_path / "a.tar", packed), kind="clips", names=train)], "clips") == ["one", "v_Lunges_g09_c02"]


def test_sources_are_drawn_by_weight_whatever_their_size(tmp_path: Path) -> None:
    few = shard(tmp_path / "few.tar", {"0.png": picture(40)})
    many = shard(tmp_path / "many.tar", {f"{i}.png": picture(200) for i in range(20)})
    unused = shard(tmp_path / "unused.tar", {"0.png": picture(120)})
    found = crops([source(few, weight=3), source(many), source(unused, weight=0)], count=400, colour=0.0)
    drawn = Counter(round(item.target.float().mean().item(), -1) for item in found)
    assert set(drawn) == {40, 200}
    assert drawn[40] / 400 == pytest.approx(0.75, abs=0.07)


def test_a_source_too_small_for_a_stage_rests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = {"width": 64, "height": 48}
    small = source(shard(tmp_path / "small.tar", {"0.png": picture(40), "0.json": told}), weight=9)
    large = source(shard(tmp_path / "large.tar", {"0.png": picture(200, (128, 128))}))
    found = crops([small, large], crop=64, count=6, colour=0.0)
    assert all(item.target.float().mean() > 150 for item in found)
    assert "no sample of" in caplog.text
    with pytest.raises(ValueError, match="no source has a sample with a short side of at least 64 px"):
        crops([small], crop=64)


# ---------------------------------------------------------------- streams


def stream_of(monkeypatch: pytest.MonkeyPatch, shards: int = 2, rows: int = 6) -> None:
    """A streamed data set whose picture r of shard s has the grey value 100 s + 10 r and the score r."""
    datasets = pytest.importorskip("datasets")

    def generate(numbers: list[int]) -> Iterator[dict[str, Any]]:
        for s in numbers:
            for r in range(rows):
                yield {"image": {"bytes": picture(100 * s + 10 * r), "path": None}, "aesthetic": float(r)}

    def load(name: str, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("someone/pictures", "train", True)
        return datasets.IterableDataset.from_generator(generate, gen_kwargs={"numbers": list(range(shards))})

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_stream_is_read_in_parts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stream_of(monkeypatch)
    data = module("data")
    sources = data.Sources([source("hf:someone/pictures", aesthetic=(1, 5))], "pictures", seed=0, per_part=3)
    assert caplog.text.count("a run that was stopped resumes at the start of a shard of latents") == 1
    parts = [sorted(entry.key.rpartition(":")[2] for entry in sources.part(k).pools[0].entries) for k in range(6)]
    assert sorted(parts[:2]) == [["0/1", "0/2", "0/3"], ["1/1", "1/2", "1/3"]]
    assert sorted(parts[2:4]) == [["0/4", "0/5"], ["1/4", "1/5"]]
    assert sorted(parts[4:]) == sorted(parts[:2])  # exhausted: from the start
    again = data.Sources([source("hf:someone/pictures", aesthetic=(1, 5))], "pictures", seed=0, per_part=3)
    assert [entry.key for entry in again.part(3).pools[0].entries] == [entry.key for entry in sources.part(3).pools[0].entries]
    item = data.Crops(sources.part(0), stage(), module("config").Faces(), (0,), 4)[2]
    assert (item.target.shape, item.skipped) == ((1, 3, 32, 32), [])
    with pytest.raises(ValueError, match=r"leave none of the pictures of hf:someone/pictures: aesthetic 8 to 9 left out 6"):
        data.Sources([source("hf:someone/pictures", aesthetic=(8, 9))], "pictures").part(0)


def test_a_streamed_folder_is_read_undecoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(picture(50 * i, format="JPEG"))
    folder = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: folder)
    entries = module("data").Sources([source("hf:someone/folder:train")], "pictures").part(0).pools[0].entries
    assert [entry.open().read() for entry in entries] == [(tmp_path / f"{i}.jpg").read_bytes() for i in range(3)]


def test_streams_that_cannot_be_opened_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, data = pytest.importorskip("datasets"), module("data")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match="hf:someone/pictures cannot be opened: no route"):
        data.Sources([source("hf:someone/pictures")], "pictures")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the package datasets: pip install 'fast-latent-decoders\[train\]'"):
        data.Sources([source("hf:someone/pictures")], "pictures")


# ---------------------------------------------------------------- validation


def test_samples_for_validation_are_evenly_spread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {f"{i:02}.png": picture(10 * i, (40 + i, 40)) for i in range(10)}
    members["07.png"] = b"no"
    pictures, clips = source(shard(tmp_path / "a.tar", members)), source(clip(tmp_path / "c.mp4"), kind="clips")
    with caplog.at_level(logging.WARNING):
        samples = module("data").pick([pictures, clips], 4, frames=3)
    assert [sample.key.rpartition(":")[2] for sample in samples[:3]] == ["01", "04", "06"]
    assert samples[0].frames.shape == (1, 3, 40, 41)
    assert "07" not in str([sample.key for sample in samples])
    every = module("data").pick([pictures, clips], 100, frames=3)
    assert len(every) == 10
    assert every[-1].frames.shape == (3, 3, 48, 64)
    assert "a.tar:07 is left out: no picture that Pillow" in caplog.text
    with pytest.raises(ValueError, match=r"not one sample of .*bad.tar can be read"):
        module("data").pick([source(shard(tmp_path / "bad.tar", {"x.jpg": b""}))], 3)


@needs_shared
def test_the_shared_pictures_and_clips() -> None:
    images, videos = SHARED / "data/images/val-0*.tar", SHARED / "data/videos/val-0000.tar"
    if not videos.exists():
        pytest.skip("needs the pictures and clips, which do not come with the repository")
    samples = module("data").pick([source(images), source(videos, kind="clips")], 6)
    assert [len(sample.frames) for sample in samples] == [1, 1, 1, 1, 1, 1]
    assert len(keys([source(images)])) == 200
    assert len(keys([source(images, faces=True)])) == 64
    test = str(SHARED / "data/videos/ucf101-splits/testlist01.txt")
    assert len(keys([source(videos, kind="clips", names=test)], "clips")) > 0
    item = crops([source(videos, kind="clips")], clips=True, crop=64)[0]
    assert (item.target.shape, item.skipped) == ((8, 3, 64, 64), [])
