"""Metrics of pictures, and the features that distances of distributions are taken in."""

import math
import socket
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from fast_latent_decoders.evaluation import backbones, features, metrics
from fast_latent_decoders.evaluation.features import open_features, resize
from fast_latent_decoders.evaluation.luma import detail
from fast_latent_decoders.evaluation.metrics import AGREEMENT, METRICS, agreement, open_metrics

OFFLINE = [name for name in METRICS if not name.startswith("lpips") and name != "dists"]  # all that need no download


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """An empty cache of weights and no network; the addresses that were asked for."""
    asked: list[str] = []

    def refuse(url: str, path: str, *args: Any, **kwargs: Any) -> None:
        asked.append(url)
        assert socket.getdefaulttimeout() == backbones.TIMEOUT
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(backbones, "_unreachable", {})
    for cached in (backbones._fetch, metrics._open, features._open):
        cached.cache_clear()
    yield asked
    for cached in (backbones._fetch, metrics._open, features._open):
        cached.cache_clear()


def photograph(side: int = 64, top: int = 60, left: int = 180) -> Tensor:
    """A crop of the astronaut (1, 3, side, side)."""
    return torch.from_numpy(data.astronaut()[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]


def noisy(picture: Tensor, sigma: float = 10.0) -> Tensor:
    return (picture + sigma * torch.randn(picture.shape)).round().clamp(0, 255).to(torch.uint8)


def blurred(picture: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(picture.float(), 3, 1, 1, count_include_pad=False).round().to(torch.uint8)


def measure(name: str, decoded: Tensor, truth: Tensor) -> list[float]:
    found, reasons = open_metrics([name])
    assert not reasons
    return found[name](decoded, truth)


# ---------------------------------------------------------------- metrics


def test_psnr_by_hand() -> None:
    truth = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    decoded = truth.clone()
    decoded[0] += 5  # mean squared error 25
    decoded[1, 0, 0, 0] = 90  # one value of 48 by 10
    assert measure("psnr", decoded, truth) == pytest.approx([10 * math.log10(255**2 / 25), 10 * math.log10(255**2 * 48 / 100)])


def test_psnr_of_equal_pictures_is_capped_and_no_picture_beats_them() -> None:
    truth = torch.zeros(2, 3, 256, 256, dtype=torch.uint8)
    decoded = truth.clone()
    decoded[1, 0, 0, 0] = 1  # 101 dB otherwise
    assert measure("psnr", decoded, truth) == [metrics.HIGHEST_PSNR] * 2


def test_no_wrap_around_of_bytes() -> None:
    truth = torch.full((1, 3, 8, 8), 250, dtype=torch.uint8)
    decoded = torch.full((1, 3, 8, 8), 10, dtype=torch.uint8)
    assert measure("tint", decoded, truth) == [240.0]
    assert measure("psnr", decoded, truth) == pytest.approx([20 * math.log10(255 / 240)])


def test_agrees_with_torchmetrics_and_scikit_image() -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure, PeakSignalNoiseRatio

    truth = photograph(192)
    decoded = noisy(truth)
    a, b = (x[0].permute(1, 2, 0).numpy() for x in (decoded, truth))
    ours = measure("psnr", decoded, truth)[0]
    assert ours == pytest.approx(peak_signal_noise_ratio(b, a))
    assert ours == pytest.approx(PeakSignalNoiseRatio(data_range=255.0)(decoded.float(), truth.float()).item(), abs=1e-4)
    by_channel = [structural_similarity(b[..., c], a[..., c], data_range=255) for c in range(3)]
    assert measure("ssim", decoded, truth) == pytest.approx([float(np.mean(by_channel))])
    independent = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)(decoded / 255, truth / 255)
    assert measure("ms_ssim", decoded, truth)[0] == pytest.approx(independent.item(), abs=1e-4)


def test_ssimulacra2_agrees_with_files(tmp_path: Path) -> None:
    from ssimulacra2 import compute_ssimulacra2

    truth = photograph(232)
    decoded = noisy(truth)
    for name, x in (("truth", truth), ("decoded", decoded)):
        Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    by_file = compute_ssimulacra2(str(tmp_path / "truth.png"), str(tmp_path / "decoded.png"))
    assert measure("ssimulacra2", decoded, truth) == pytest.approx([by_file])
    assert measure("ssimulacra2", truth, truth) == pytest.approx([100.0])


def test_stlpips_agrees_with_its_package() -> None:
    from stlpips_pytorch import stlpips

    truth = photograph()
    decoded = noisy(truth)
    network = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False).eval()
    with torch.no_grad():
        wanted = network(*(x / 127.5 - 1 for x in (decoded, truth))).item()
    assert measure("stlpips", decoded, truth) == pytest.approx([wanted], rel=1e-4)


def test_tint_is_signed_per_picture_and_does_not_cancel_in_its_size() -> None:
    truth = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    decoded = truth.clone()
    decoded[0, 0] += 6
    decoded[1, 0] -= 6
    decoded[1, 2, :4] += 6
    assert measure("tint_r", decoded, truth) == [6.0, -6.0]
    assert measure("tint_g", decoded, truth) == [0.0, 0.0]
    assert measure("tint_b", decoded, truth) == [0.0, 3.0]
    assert measure("tint", decoded, truth) == [2.0, 3.0]


def test_sharpness() -> None:
    truth = photograph()
    assert measure("sharpness", truth, truth) == [1.0]
    assert measure("sharpness", blurred(truth), truth)[0] < 0.3
    assert measure("sharpness", noisy(truth), truth)[0] > 1.2
    fine = torch.randint(100, 120, (1, 3, 64, 64))
    assert measure("sharpness", (100 + 2 * (fine - 100)).byte(), fine.byte())[0] == pytest.approx(4, rel=0.02)  # amplitude 2, power 4
    flat = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    assert math.isnan(measure("sharpness", fine.byte(), flat)[0])


def test_mesh_is_what_repeats_with_the_latents() -> None:
    truth = torch.randint(60, 200, (1, 3, 250, 203)).byte()
    dots = truth.clone()
    dots[..., 3::8, 5::8] += 32  # one pixel of 64: 32 * sqrt(1 / 64 - 1 / 64**2)
    assert measure("mesh", dots, truth)[0] == pytest.approx(3.97, abs=0.01)
    assert measure("mesh", truth + 9, truth)[0] == pytest.approx(0, abs=1e-9)  # tint is not its affair
    assert measure("mesh", torch.randint(60, 200, truth.shape).byte(), truth)[0] < 3  # rms error 33 in luma, 775 latents


@pytest.mark.parametrize("shape", [(64, 64), (96, 160)])
def test_detail_of_white_noise_is_its_variance(shape: tuple[int, int]) -> None:
    values = [detail(128 + 8 * torch.randn(1, *shape).expand(3, -1, -1)) for _ in range(20)]
    assert np.mean(values) == pytest.approx(64, rel=0.05)
    ramp = torch.linspace(0, 255, shape[1]).expand(3, *shape)  # no detail, but a jump at the border
    assert detail(ramp) < 0.02


@pytest.mark.parametrize("name", OFFLINE)
def test_best_value_for_equal_pictures_and_worse_for_worse(name: str) -> None:
    info, side = METRICS[name], max(64, METRICS[name].smallest)
    truth = photograph(side)
    brighter = (truth.float() * 0.9 + 25.5).round().byte()
    equal, worse, worst = (measure(name, x, truth)[0] for x in (truth, noisy(brighter, 5), noisy(brighter, 40)))
    best = {"psnr": metrics.HIGHEST_PSNR, "agreement_psnr": metrics.HIGHEST_PSNR, "ssimulacra2": 100.0}.get(name, {"higher": 1, "lower": 0, "zero": 0, "one": 1}[info.better])
    assert equal == pytest.approx(best, abs=1e-6)
    assert info.badness(equal) < info.badness(worse)
    if not name.startswith("tint"):
        assert info.badness(worse) < info.badness(worst)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_value_depends_on_its_picture_only(name: str) -> None:
    side = max(64, METRICS[name].smallest)
    truth = torch.cat([photograph(side), photograph(side, 150, 100)])
    decoded = noisy(truth)
    together = measure(name, decoded, truth)
    assert together == [measure(name, decoded[i : i + 1], truth[i : i + 1])[0] for i in (0, 1)]
    assert measure(name, decoded.flip(0), truth.flip(0)) == together[::-1]


@pytest.mark.parametrize("name", OFFLINE)
def test_pictures_smaller_than_the_windows_are_nan_with_a_reason(name: str) -> None:
    metric = open_metrics([name])[0][name]
    least = metric.info.smallest
    assert math.isfinite(metric(noisy(photograph(least), 40), photograph(least))[0])
    assert metric.why_nan(least, least) is None
    if least > 1:
        small = photograph(least - 1)
        assert all(map(math.isnan, metric(small, small)))
        assert f"at least {least} px" in str(metric.why_nan(least + 50, least - 1))


def test_wrong_pictures_are_errors() -> None:
    metric = open_metrics(["psnr"])[0]["psnr"]
    picture = photograph()
    with pytest.raises(ValueError, match="uint8 pictures"):
        metric(picture.float(), picture)
    with pytest.raises(ValueError, match="one shape"):
        metric(picture, picture[..., 1:])
    with pytest.raises(ValueError, match="did you mean 'ssimulacra2'"):
        open_metrics(["simulacra2"])


def test_what_cannot_be_had_is_said_and_tried_once(no_network: list[str]) -> None:
    for _ in range(2):
        found, reasons = open_metrics(METRICS)
        assert sorted(found) == sorted(OFFLINE)
        assert sorted(reasons) == ["dists", "lpips_alex", "lpips_squeeze", "lpips_vgg"]
        assert all(reason.startswith("not available: ") and "no network in tests" in reason for reason in reasons.values())
    assert len(no_network) == 1  # the host has not answered, so its other files are not asked for
    assert socket.getdefaulttimeout() is None


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ssimulacra2", None)
    found, reasons = open_metrics(["psnr", "ssimulacra2"])
    assert list(found) == ["psnr"]
    assert reasons["ssimulacra2"].startswith("not available: ssimulacra2 cannot be imported")
    assert "fast-latent-decoders[eval]" in reasons["ssimulacra2"]


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
def test_lpips_with_weights_at_hand(no_network: list[str]) -> None:
    """Random weights where the download would be: equal pictures are at 0, others not, and the package gets [-1, 1]."""
    import lpips
    from torchvision.models import squeezenet1_1

    name = "lpips_squeeze"  # the others' networks are large
    path = Path(torch.hub.get_dir()) / "checkpoints" / backbones.torchvision_url("squeezenet1_1").split("/")[-1]
    path.parent.mkdir(parents=True)
    torch.save(squeezenet1_1().state_dict(), path)
    truth = photograph()
    decoded = noisy(truth, 40)
    assert measure(name, truth, truth) == [0.0]
    network = lpips.LPIPS(net="squeeze", verbose=False)
    with torch.no_grad():
        wanted = network(decoded / 127.5 - 1, truth / 127.5 - 1).item()
    assert measure(name, decoded, truth) == pytest.approx([wanted], rel=1e-3)
    assert wanted > 0 and not no_network


def test_agreement() -> None:
    truth = photograph()
    tinted = (truth.float() * torch.tensor([0.9, 0.9, 0.9])[:, None, None] + 20).round().byte()
    cases = {"equal": truth, "tinted": tinted, "noisy": noisy(truth), "other": photograph(64, 150, 100), "inverted": 255 - truth}
    found = {name: {key: values[0] for key, values in agreement(x, truth).items()} for name, x in cases.items()}
    assert found["equal"] == pytest.approx({"agreement_mae": 0, "agreement_psnr": metrics.HIGHEST_PSNR, "agreement_correlation": 1})
    assert found["tinted"]["agreement_correlation"] > 0.9999  # a gain and an offset are not structure
    assert found["inverted"]["agreement_correlation"] == pytest.approx(-1)
    assert found["noisy"]["agreement_psnr"] > measure("psnr", cases["noisy"], truth)[0] + 8  # the blur takes the grain out
    assert found["noisy"]["agreement_correlation"] > found["other"]["agreement_correlation"]
    flat = torch.full_like(truth, 3)
    assert set(agreement(flat, truth)) == set(AGREEMENT) and math.isnan(agreement(flat, truth)["agreement_correlation"][0])


# ---------------------------------------------------------------- features


def test_the_one_resize_is_antialiased_bicubic() -> None:
    picture = photograph(200)
    # As clean-fid does: Pillow's mode "F", which does not round and clip between its two passes.
    pillow = [np.asarray(Image.fromarray(plane.astype(np.float32)).resize((64, 64), Image.Resampling.BICUBIC)) for plane in picture[0].numpy()]
    ours = resize(picture, 64)
    assert ours.dtype == torch.uint8 and np.abs(ours[0].numpy() - np.stack(pillow).clip(0, 255)).max() < 0.51
    assert resize(picture, 200) is picture


def test_alexnet_st() -> None:
    network = open_features("alexnet-st")
    assert not isinstance(network, str)
    pictures = torch.cat([photograph(72), photograph(72, 150, 100)])
    found = network.extract(pictures)
    assert found.shape == (2, network.d) and found.dtype == torch.float32 and found.isfinite().all()
    assert torch.allclose(network.extract(pictures[1:])[0], found[1], atol=1e-5)
    assert (found[0] - found[1]).norm() > 0.1 * found[0].norm()
    assert network.extract(photograph(40)[..., :30]).shape == (1, 256)
    assert network.extract(pictures[:0]).shape == (0, 256)
    assert network.distance_title("frechet") == "Frechet distance on shift-tolerant AlexNet features"
    assert "FID" not in network.distance_title("kernel")
    with pytest.raises(ValueError, match="uint8"):
        network.extract(pictures.float())


def test_squeezenet_with_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    save_file(squeezenet1_1().state_dict(), tmp_path / "squeezenet.safetensors")
    network = open_features("squeezenet", weights=tmp_path / "squeezenet.safetensors")
    assert not isinstance(network, str) and network.extract(photograph()).shape == (1, 512)
    for missing in (None, tmp_path / "nothing"):
        assert str(open_features("squeezenet", weights=missing)).startswith("not available: ")


def test_features_that_cannot_be_had(no_network: list[str]) -> None:
    for _ in range(2):
        assert str(open_features("inception")).startswith("not available: ")
    assert len(no_network) <= 1  # none where torch-fidelity is not installed
    with pytest.raises(ValueError, match="did you mean 'inception'"):
        open_features("inceptio")
