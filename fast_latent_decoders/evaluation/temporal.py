"""Measures of a decoded clip in time that need no weights: one value per clip.

Clips are (T, 3, H, W) uint8, decoded and truth of one shape, rounded as a saved clip is; values are in 1/255. A clip is walked pair
of frames by pair of frames, so memory does not grow with its length (but for the motion of the warping errors: 9 bytes a pixel).
Where there is nothing to measure the value is NaN with a reason (`Missing`), never zero.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fast_latent_decoders.evaluation.info import MetricInfo, Missing
from fast_latent_decoders.evaluation.motion import Motion, motion_of, places, sample_at

STILL = 2.0  # 1/255: mean change of a cell up to which the truth is at rest; noise stays below, motion seldom does
CELL = 8  # pixels of a cell's side: one latent, the least that a decoder can be told about

VIDEO_METRICS: dict[str, MetricInfo] = {
    metric.name: metric
    for metric in (
        MetricInfo("temporal_difference", "temporal difference error", "lower", "1/255", 3),
        MetricInfo("flicker", "flicker", "zero", "1/255", 3),
        MetricInfo("warping_error", "warping error", "lower", "1/255", 3),
        MetricInfo("warping_truth", "warping error of the truth", "lower", "1/255", 3),
        MetricInfo("warping_excess", "excess warping error", "zero", "1/255", 3),
        MetricInfo("join_error", "error at chunk joins", "zero", "1/255", 3),
    )
}

Measure = Callable[[Tensor, Tensor], float]  # decoded and truth, (T, 3, H, W) uint8, to one value

# ---------------------------------------------------------------- change


def check(decoded: Tensor, truth: Tensor) -> None:
    for name, clip in (("decoded", decoded), ("true", truth)):
        if clip.ndim != 4 or clip.shape[1] != 3 or clip.dtype != torch.uint8 or not clip.numel():
            raise ValueError(f"expected a {name} clip (T, 3, H, W) of uint8, got {tuple(clip.shape)} of {clip.dtype}")
    if decoded.shape != truth.shape:
        raise ValueError(f"the decoded clip {tuple(decoded.shape)} and the true one {tuple(truth.shape)} differ in shape")


def changes(clip: Tensor) -> Iterator[Tensor]:
    """From each frame to the next, (3, H, W) float32 in 1/255; T - 1 of them."""
    return (b.float() - a.float() for a, b in pairwise(clip))


def transition_errors(decoded: Tensor, truth: Tensor) -> list[float]:
    """Mean |change of the decoded - change of the truth| for each of the T - 1 transitions."""
    return [(a - b).abs().mean(dtype=torch.float64).item() for a, b in zip(changes(decoded), changes(truth), strict=True)]


def single(decoded: Tensor) -> Missing | None:
    return Missing("a single frame has no change in time") if len(decoded) == 1 else None


def temporal_difference_error(decoded: Tensor, truth: Tensor) -> float:
    """Mean |d decoded - d truth| over consecutive frames, in 1/255: what the trainer's temporal term is, on rounded clips.

    A constant offset, such as a tint, costs nothing. Counts wrong motion as well as flicker.
    """
    check(decoded, truth)
    return single(decoded) or float(np.mean(transition_errors(decoded, truth)))


def cell_means(change: Tensor) -> Tensor:
    """Mean |change| over cells of 8x8 pixels and three colours: (H/8, W/8), cells at the right and lower edge may be smaller."""
    return avg_pool2d(change.abs().mean(0, keepdim=True), CELL, ceil_mode=True, count_include_pad=False)[0]


def flicker(decoded: Tensor, truth: Tensor, still: float = STILL) -> float:
    """How much more the decoded changes than the truth where the truth is at rest, in 1/255. Zero for equal clips.

    Over all cells of 8x8 pixels and all consecutive frames where the truth's mean |change| is at most `still`: mean |d decoded| minus
    mean |d truth|. Above zero the decoder flickers; below zero it takes the camera's noise away.

    Why so: change in a picture at rest is what a viewer calls flicker, and VBench (Huang et al., CVPR 2024) measures it as the mean
    absolute change of whole clips chosen to be static. Real clips have parts at rest, so cells are chosen instead of clips; and they
    have noise of their own, so the truth's change is subtracted. Cells, not pixels: noise moves a pixel at random across any
    threshold, and what is left of one alone would be quieter than its surroundings, which the decoder sees.
    """
    check(decoded, truth)
    mine = true = cells = 0.0
    for a, b in zip(changes(decoded), changes(truth), strict=True):
        rest = cell_means(b)
        kept = rest <= still
        mine += cell_means(a)[kept].sum(dtype=torch.float64).item()
        true += rest[kept].sum(dtype=torch.float64).item()
        cells += kept.sum().item()
    if not cells:
        return single(decoded) or Missing(f"nowhere is the truth at rest: no {CELL}x{CELL} cell changes by {still:g}/255 or less")
    return (mine - true) / cells


def join_error(decoded: Tensor, truth: Tensor, chunk: int) -> float:
    """Temporal-difference error across the joins of chunks minus that inside chunks, in 1/255.

    Args:
        chunk: frames decoded by one call (the pipeline's `decode_chunk_size`); the last chunk may be shorter.

    A video decoder that sees `chunk` frames at a time jumps where one call ends and the next begins; a frame-wise one has about zero.
    A single clip's value also holds what its motion at the joins happens to be: average over clips.
    """
    check(decoded, truth)
    if chunk < 1:
        raise ValueError(f"a chunk has at least one frame, got chunk={chunk}")
    if len(decoded) <= chunk:
        return single(decoded) or Missing(f"{len(decoded)} frames fit into one chunk of {chunk}: there is no join")
    if chunk == 1:
        return Missing("chunks of one frame have no inside to compare their joins with")
    errors = np.array(transition_errors(decoded, truth))
    joins = np.arange(1, len(decoded)) % chunk == 0  # transition i leads from frame i to frame i + 1
    return float(errors[joins].mean() - errors[~joins].mean())


# ---------------------------------------------------------------- along the motion


class Warping(NamedTuple):
    """Warping errors in 1/255; NaN with a reason where there is no motion to follow."""

    decoded: float
    truth: float
    share: float  # of the pixels that were compared, the rest being hidden or out of the picture

    @property
    def excess(self) -> float:
        """Decoded minus truth: zero is a clip as steady as the truth."""
        return self.decoded if isinstance(self.decoded, Missing) else self.decoded - self.truth

    @property
    def ratio(self) -> float:
        """Decoded over truth; NaN with a reason where the truth has none."""
        if isinstance(self.decoded, Missing):
            return self.decoded
        return self.decoded / self.truth if self.truth else Missing("the truth has no warping error to divide by")


def warping_error(decoded: Tensor, truth: Tensor, motion: Sequence[Motion] | None = None) -> Warping:
    """Mean |frame - next frame brought back along the motion of the truth|, over visible pixels of all pairs: decoded and truth.

    After Lai et al. (ECCV 2018), who take the square and a flow network. Motion is that of the truth for both, so that a decoder is
    not helped by its own wrong motion. The truth's own error is what noise, light and a wrong flow leave; and since blurring a clip
    makes its error smaller, read the excess, for which zero is best, not the error.

    Args:
        motion: `motion_of(truth)`, for whoever measures several decoders on one clip.
    """
    check(decoded, truth)
    if missing := single(decoded):
        return Warping(missing, missing, missing)
    if motion is None:
        if min(truth.shape[2:]) < 32:
            missing = Missing(f"optical flow needs frames of at least 32x32 pixels, these have {truth.shape[2]}x{truth.shape[3]}")
            return Warping(missing, missing, missing)
        motion = motion_of(truth)
    errors = np.zeros(2)
    pixels = 0
    for t, (flow, visible) in enumerate(motion):
        where = places(flow)
        for i, clip in enumerate((decoded, truth)):
            now, later = (np.ascontiguousarray(clip[s].permute(1, 2, 0).cpu().numpy(), np.float32) for s in (t, t + 1))
            errors[i] += np.abs(now - sample_at(later, where))[visible].sum(dtype=np.float64) / 3
        pixels += int(visible.sum())
    if not pixels:
        missing = Missing("no pixel of the truth can be followed from one frame to the next")
        return Warping(missing, missing, 0.0)
    mine, true = (errors / pixels).tolist()
    return Warping(mine, true, pixels / (len(motion) * truth.shape[2] * truth.shape[3]))


# ---------------------------------------------------------------- by name


Kept = tuple[Callable[[], Tensor | None], int]


class LastWarping:
    """The last answer of `warping_error` and the motion of the last truth, since three metrics want the first and several decoders
    the second. Clips are told by identity and version, so one that was changed in place is a new one."""

    def __init__(self) -> None:
        self.truth: Kept | None = None
        self.decoded: Kept | None = None
        self.motion: list[Motion] | None = None
        self.found: Warping | None = None

    @staticmethod
    def keep(clip: Tensor) -> Kept | None:
        return None if clip.is_inference() else (weakref.ref(clip), clip._version)  # inference tensors count no versions

    def same(self, kept: Kept | None, clip: Tensor) -> bool:
        return kept is not None and kept[0]() is clip and kept[1] == clip._version

    def __call__(self, decoded: Tensor, truth: Tensor) -> Warping:
        check(decoded, truth)
        if not self.same(self.truth, truth):
            able = len(truth) > 1 and min(truth.shape[2:]) >= 32
            self.motion, self.found = motion_of(truth) if able else None, None
            self.truth = self.keep(truth)
        if self.found is None or not self.same(self.decoded, decoded):
            self.found = warping_error(decoded, truth, self.motion)
            self.decoded = self.keep(decoded)
        return self.found


def open_video_metrics(
    names: Sequence[str] = tuple(VIDEO_METRICS), *, chunk: int | None = None
) -> tuple[dict[str, Measure], dict[str, str]]:
    """The measures that can be had, by name, and for each that cannot the reason; every name is in one of the two.

    Args:
        chunk: frames decoded by one call, which `join_error` needs.

    Raises:
        ValueError: a name is not in VIDEO_METRICS.
    """
    if unknown := [name for name in names if name not in VIDEO_METRICS]:
        raise ValueError(f"there is no video metric {', '.join(unknown)}; there are {', '.join(VIDEO_METRICS)}")
    last = LastWarping()
    every: dict[str, Measure] = {
        "temporal_difference": temporal_difference_error,
        "flicker": flicker,
        "warping_error": lambda decoded, truth: last(decoded, truth).decoded,
        "warping_truth": lambda decoded, truth: last(decoded, truth).truth,
        "warping_excess": lambda decoded, truth: last(decoded, truth).excess,
    }
    reasons = {}
    if chunk is not None:
        every["join_error"] = lambda decoded, truth: join_error(decoded, truth, chunk)
    else:
        reasons["join_error"] = "it needs chunk=, the number of frames that one call decodes"
    try:
        import cv2  # noqa: F401
    except ImportError:
        for name in [name for name in every if name.startswith("warping")]:
            reasons[name] = "it needs OpenCV's optical flow: pip install 'fast-latent-decoders[eval]'"
    opened = {name: every[name] for name in names if name not in reasons}
    return opened, {name: reasons[name] for name in names if name in reasons}
