"""Crops, what is changed in them, and faces."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut
from torch.utils.data import DataLoader

from .samples import clip, crops, encoded, picture, shard, source, stage
from .tiny import SHARED, module, needs_shared

YUNET = SHARED / "weights/face_detection_yunet_2026may.onnx"

# ---------------------------------------------------------------- the same crops, whoever makes them


def test_crops_follow_from_seed_and_number_alone(tmp_path: Path) -> None:
    members = {f"{i}.png": picture(20 * i, (80, 64)) for i in range(8)} | {"bad.png": b"no"}
    every = crops([source(shard(tmp_path / "a.tar", members))], count=12, seed=(1, 2), colour=0.5, jpeg=0.5)
    collate = module("data").collate
    whole = [list(DataLoader(every, batch_size=4, num_workers=n, collate_fn=collate)) for n in (0, 2)]
    for a, b in zip(*whole, strict=True):
        assert torch.equal(a.target, b.target)
        assert torch.equal(a.mask, b.mask)
        assert a.skipped == b.skipped
    assert torch.equal(every[7].target[None], whole[0][1].target[3:])
    assert torch.equal(pickle.loads(pickle.dumps(every))[7].target, every[7].target)
    other = crops([source(tmp_path / "a.tar")], count=12, seed=(1, 3), colour=0.5, jpeg=0.5)
    assert not all(torch.equal(a.target, b.target) for a, b in zip(every, other, strict=True))


def test_all_frames_of_a_clip_are_changed_alike(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.avi", level=100, size=(96, 80))
    changed = 0
    for item in crops([source(path, kind="clips")], clips=True, count=12, jpeg=0.5, colour=0.5):
        assert (item.target.float() - item.target[:1].float()).abs().max() <= 6
        changed += int((item.target[0, 0].float() - item.target[0, 1].float()).abs().mean() > 5)
    assert changed  # a colour matrix was among them


# ---------------------------------------------------------------- augmentation


def test_boxes_follow_the_crop(tmp_path: Path) -> None:
    augment = module("augment").augment
    frames = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)
    frames[..., 30:50, 60:90] = 255
    boxes = np.array([[60, 30, 90, 50], [0, 0, 4, 4]], np.float32)
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(40):
        target, moved = augment(frames, boxes, stage(colour=0.0), rng)
        bright = target[0, 0] > 200
        covered = torch.zeros_like(bright)
        for x0, y0, x1, y1 in moved.round().astype(int):
            covered[y0:y1, x0:x1] = True
        assert not (bright & ~covered).any()
        assert (moved >= 0).all() and (moved <= 32).all()
        seen += int(bright.any() and len(moved) > 0)
    assert seen > 10
    assert augment(frames, None, stage(), rng)[1] is None


def test_each_change_can_be_switched_off_and_on() -> None:
    augment = module("augment").augment
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8))
    off = {"flip": 0.0, "colour": 0.0, "grey": 0.0, "jpeg": 0.0, "vivid": 0.0}
    for _ in range(4):
        assert torch.equal(augment(frames, None, stage(**off), np.random.default_rng(0))[0], frames)
    assert torch.equal(augment(frames, None, stage(**{**off, "flip": 1.0}), np.random.default_rng(0))[0], frames.flip(3))
    for change in ("colour", "grey", "jpeg", "vivid"):
        assert not torch.equal(augment(frames, None, stage(**{**off, change: 1.0}), np.random.default_rng(0))[0], frames)
    grey = augment(frames, None, stage(**{**off, "grey": 1.0}), np.random.default_rng(0))[0][0]
    assert (grey == grey[:1]).all() and grey.float().std() > 20, "no colour, but a picture"
    with pytest.raises(ValueError, match="short side of at least 64 px to crop from, got 32x32"):
        augment(frames, None, stage(crop=64), np.random.default_rng(0))


def test_a_vivid_crop_is_sharper_and_more_colourful_but_no_other_picture() -> None:
    augment, before = module("augment"), Image.fromarray(astronaut()).resize((128, 128))
    plain, none, full = (np.asarray(p, np.float64) for p in (before, augment.generated(before, 0, 0, 0), augment.generated(before, 1, 1, 1)))
    assert np.abs(none - plain).max() <= 1
    for measure, factor in ((lambda x: np.abs(np.diff(x.mean(2))).mean(), 1.5), (lambda x: x.std(axis=2).mean(), 1.4), (lambda x: x.mean(2).std(), 1.1)):
        assert measure(full) > factor * measure(plain)
    luma = np.array([0.299, 0.587, 0.114])
    assert abs((full.mean((0, 1)) - plain.mean((0, 1))) @ luma) < 10


def test_pictures_are_reduced_by_no_more_than_the_stage_says() -> None:
    """A step every 16 px: in a crop reduced by r they lie 16 / r apart."""
    augment = module("augment").augment
    steps = (torch.arange(512) // 16 % 2 * 255).to(torch.uint8).expand(1, 3, 512, 512)
    factors = []
    for i in range(40):
        row = augment(steps, None, stage(crop=128, colour=0.0, reduce=2.0), np.random.default_rng(i))[0][0, 0, 0]
        factors.append(((row > 127).int().diff() != 0).sum().item() * 16 / 128)
    assert min(factors) == pytest.approx(1, abs=0.15)
    assert 1.7 < max(factors) <= 2.2
    assert 10 < sum(factor < 1.15 for factor in factors) < 32  # half of them, and the small reductions


def test_a_colour_matrix_is_what_it_says() -> None:
    augment, rng = module("augment"), np.random.default_rng(3)
    coefficients = augment.colour_matrix(rng)
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    got = np.asarray(Image.fromarray(values).convert("RGB", coefficients), np.float64)
    matrix = np.array(coefficients).reshape(3, 4)
    expected = (values @ matrix[:, :3].T + matrix[:, 3]).clip(0, 255)
    assert np.abs(got - expected).max() <= 0.51
    assert np.abs(matrix[:, :3].sum(1) * 127.5 + matrix[:, 3] - 127.5).max() < 1e-9  # grey stays


# ---------------------------------------------------------------- faces


def test_boxes_of_the_metadata_make_the_mask(tmp_path: Path) -> None:
    faces = module("config").Faces(weight=3.0)
    for boxes in ([[16, 12, 48, 36]], [[0.25, 0.25, 0.75, 0.75]], "[[16, 12, 48, 36]]"):
        values = np.zeros((48, 64, 3), np.uint8)
        values[12:36, 16:48] = 255
        members = {"0.png": encoded(Image.fromarray(values), "PNG").getvalue(), "0.json": {"face_bboxes": boxes}}
        for item in crops([source(shard(tmp_path / "a.tar", members), faces=True)], faces=faces, colour=0.0, reduce=1.0):
            assert torch.equal(item.mask[0, 0], item.target[0, 0] > 127)
            assert item.mask.any()


def test_a_detector_that_cannot_be_had_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faces, tar = module("config").Faces, source(shard(tmp_path / "a.tar", {"0.png": picture()}))
    with pytest.raises(FileNotFoundError, match=r"no face detector at .*none.onnx: give YuNet's .onnx by faces.detector="):
        crops([tar], faces=faces(weight=2.0, detector=str(tmp_path / "none.onnx")))
    crops([tar], faces=faces(weight=1.0, detector=str(tmp_path / "none.onnx")))[0]
    (tmp_path / "there.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"finding faces needs OpenCV: pip install 'fast-latent-decoders\[train\]'"):
        crops([tar], faces=faces(weight=2.0, detector=str(tmp_path / "there.onnx")))


def test_faces_that_nothing_tells_of_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = source(shard(tmp_path / "a.tar", {"0.png": picture()}))
    found = crops([tar], faces=module("config").Faces(weight=2.0))
    assert "no sample has boxes: give faces.detector" in caplog.text
    assert not found[0].mask.any()


@needs_shared
def test_the_detector_finds_a_real_face(tmp_path: Path) -> None:
    """At (178, 62), 89 x 113 px in scikit-image's astronaut, and none in its cup of coffee."""
    pytest.importorskip("cv2")
    from skimage.data import astronaut, coffee

    detector = module("faces").FaceDetector(str(YUNET))
    face = torch.from_numpy(astronaut()).permute(2, 0, 1)[None, :, :256, 96:352]
    mask = detector.mask(face, None)
    assert mask.shape == (1, 1, 256, 256)
    rows, columns = (torch.nonzero(mask[0, 0].any(axis)).flatten() for axis in (1, 0))
    found = [columns[0] + 96, rows[0], len(columns), len(rows)]
    assert [int(value) for value in found] == pytest.approx([178, 62, 89, 113], abs=8)
    assert not detector.mask(torch.from_numpy(coffee()).permute(2, 0, 1)[None, :, :256, :256], None).any()
    assert not detector.mask(face, np.zeros((0, 4), np.float32)).any()  # the metadata know better

    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(astronaut()[:200, 120:320]), "PNG").getvalue())
    faces = module("config").Faces(weight=2.0, detector=str(YUNET))
    every = crops([source(tmp_path)], faces=faces, crop=128, colour=0.0, count=8)
    loaded = [next(iter(DataLoader(every, batch_size=8, num_workers=n, collate_fn=module("data").collate))) for n in (0, 2)]
    assert torch.equal(loaded[0].mask, loaded[1].mask)
    assert loaded[0].mask.any()
