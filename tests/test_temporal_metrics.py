"""Measures of clips in time. Values are worked out by hand."""

import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fast_latent_decoders.evaluation import temporal
from fast_latent_decoders.evaluation.info import Missing
from fast_latent_decoders.evaluation.motion import Motion, motion_of
from fast_latent_decoders.evaluation.temporal import (
    VIDEO_METRICS,
    flicker,
    join_error,
    open_video_metrics,
    temporal_difference_error,
    warping_error,
)

ROOT = Path(__file__).parents[1]


def noise(*shape: int) -> Tensor:
    return torch.randint(20, 200, shape, dtype=torch.uint8)


def moving_square(frames: int = 5, step: int = 2) -> Tensor:
    """A 16x16 square of noise on grey, `step` pixels further to the right in each frame."""
    square, clip = noise(3, 16, 16), torch.full((frames, 3, 40, 48), 100, dtype=torch.uint8)
    for t in range(frames):
        clip[t, :, 12:28, 8 + t * step : 24 + t * step] = square
    return clip


def square_motion(frames: int = 5, step: int = 2) -> list[Motion]:
    found = []
    for t in range(frames - 1):
        flow, visible = np.zeros((40, 48, 2), np.float32), np.ones((40, 48), bool)
        flow[12:28, 8 + t * step : 24 + t * step, 0] = step
        visible[12:28, 24 + t * step : 24 + (t + 1) * step] = False  # grey that the square covers next
        found.append(Motion(flow, visible))
    return found


def blinking(truth: Tensor, by: int = 6) -> Tensor:
    """Every other frame brighter."""
    decoded = truth.clone()
    decoded[1::2] += by
    return decoded


def test_blinking_costs_its_step_in_every_measure() -> None:
    truth = moving_square()
    decoded = blinking(truth)
    assert temporal_difference_error(decoded, truth) == pytest.approx(6)
    still = noise(1, 3, 40, 48).expand(5, -1, -1, -1).contiguous()
    assert flicker(blinking(still), still) == pytest.approx(6)
    found = warping_error(decoded, truth, square_motion())
    assert found.truth == 0 and found.decoded == pytest.approx(6) and found.excess == pytest.approx(6)
    assert isinstance(found.ratio, Missing)
    assert found.share == pytest.approx(1 - 16 * 2 / (40 * 48))


def test_equal_clips_and_constant_offsets_cost_nothing() -> None:
    truth = moving_square()
    for decoded in (truth, truth + 9):
        assert temporal_difference_error(decoded, truth) == 0
        assert flicker(decoded, truth) == 0
        assert join_error(decoded, truth, 2) == 0
        assert warping_error(decoded, truth).excess == pytest.approx(0, abs=1e-6)


def test_temporal_difference_is_the_trainers_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    from losses import temporal as term

    decoded, truth = noise(4, 3, 16, 16), noise(4, 3, 16, 16)
    assert temporal_difference_error(decoded, truth) == pytest.approx(term(decoded.float(), truth.float(), 4).item(), rel=1e-6)


def test_flicker_looks_only_where_the_truth_rests() -> None:
    truth = noise(1, 3, 20, 32).repeat(3, 1, 1, 1)  # 20 rows: the last cells have four
    truth[:, :, :, 16:] = noise(3, 3, 20, 16)  # the right half moves
    decoded = truth.clone()
    decoded[1, :, :, 16:] = 0  # and is wrong, which is not flicker
    assert flicker(decoded, truth) == 0
    decoded[1, :, 16:, :8] += 10  # one of the six cells at rest, in two transitions
    assert flicker(decoded, truth) == pytest.approx(10 / 6)
    camera = truth[:, :, :, :16].clone()
    camera[1] += 1
    assert flicker(truth[:, :, :, :16], camera) == pytest.approx(-1)  # its noise is taken away


def test_join_error_isolates_the_joins() -> None:
    truth = moving_square(frames=7)
    decoded = truth.clone()
    decoded[3:6] += 5  # chunks of three: jumps from frame 2 to 3 and from 5 to 6
    assert join_error(decoded, truth, 3) == pytest.approx(5)
    assert join_error(decoded, truth, 4) == pytest.approx(0 - 10 / 5)  # its join is from 3 to 4; the jumps are inside


def test_flow_of_the_truth_follows_a_shift() -> None:
    import cv2

    wide = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8), (0, 0), 2)
    wide = cv2.normalize(wide, None, 0, 255, cv2.NORM_MINMAX)
    truth = torch.stack([torch.from_numpy(wide[:, 3 * t : 3 * t + 72]).permute(2, 0, 1) for t in range(4)])
    threads = cv2.getNumThreads()
    motion = motion_of(truth)
    assert cv2.getNumThreads() == threads
    assert np.abs(np.median(motion[0].flow, axis=(0, 1)) - (-3, 0)).max() < 0.1
    assert not motion[0].visible[:, :2].any() and motion[0].visible[:, 8:-8].mean() > 0.95  # the left edge leaves the picture
    found = warping_error(truth, truth)
    unmoved = (truth[1:].float() - truth[:-1].float()).abs().mean().item()
    assert found.decoded == found.truth < unmoved / 10
    assert warping_error(blinking(truth // 2 + 20), truth // 2 + 20).excess == pytest.approx(6, abs=0.5)


def test_what_cannot_be_measured_is_nan_with_a_reason() -> None:
    one, clip = noise(1, 3, 40, 48), noise(4, 3, 40, 48)
    opened, reasons = open_video_metrics(chunk=2)
    assert not reasons
    for measure in opened.values():
        value = measure(one, one)
        assert math.isnan(value) and isinstance(value, Missing) and value.reason == "a single frame has no change in time"
    cases = {
        "nowhere is the truth at rest": flicker(clip, clip),
        "fit into one chunk": join_error(clip, clip, 4),
        "no inside": join_error(clip, clip, 1),
        "at least 32x32": warping_error(clip[..., :8, :8], clip[..., :8, :8]).excess,
        "can be followed": warping_error(clip, clip, [Motion(m.flow, m.visible & False) for m in motion_of(clip)]).ratio,
    }
    for said, value in cases.items():
        assert isinstance(value, Missing) and said in value.reason
    assert pickle.loads(pickle.dumps(value)).reason == value.reason


def test_wrong_clips_are_refused() -> None:
    for wrong in (noise(2, 3, 8, 8).float(), noise(3, 8, 8), noise(3, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"expected a decoded clip|differ in shape"):
            temporal_difference_error(wrong, noise(2, 3, 8, 8))
    with pytest.raises(ValueError, match="chunk=0"):
        join_error(noise(2, 3, 8, 8), noise(2, 3, 8, 8), 0)


def test_metrics_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(temporal, "motion_of", lambda truth: calls.append(1) or motion_of(truth))
    opened, reasons = open_video_metrics()
    assert (
        set(opened) | set(reasons) == set(VIDEO_METRICS) and list(reasons) == ["join_error"] and "chunk=" in reasons["join_error"]
    )
    truth = moving_square()
    decoded = blinking(truth)
    values = {name: measure(decoded, truth) for name, measure in opened.items()}
    assert values["warping_excess"] == pytest.approx(values["warping_error"] - values["warping_truth"])
    assert opened["warping_error"](truth, truth) == values["warping_truth"]  # another decoder, the same motion
    assert len(calls) == 1
    decoded.copy_(truth)  # changed in place
    assert opened["warping_excess"](decoded, truth) == 0
    with torch.inference_mode():
        for by in (3, 6):
            assert opened["warping_excess"](truth + 0, truth) == 0 < opened["warping_excess"](blinking(truth, by), truth)
    with pytest.raises(ValueError, match="no video metric fvd"):
        open_video_metrics(["fvd"])


def test_without_opencv_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    opened, reasons = open_video_metrics(["flicker", "warping_excess"])
    assert list(opened) == ["flicker"] and "fast-latent-decoders[eval]" in reasons["warping_excess"]
