"""Motion in a clip by optical flow, without weights: where each pixel goes, and where that can be trusted."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Motion(NamedTuple):
    """From one frame to the next: where each pixel goes, and where that can be trusted."""

    flow: np.ndarray  # (H, W, 2) float32, x and y in pixels
    visible: np.ndarray  # (H, W) bool: the pixel is in the next frame too


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenCV on one thread: DIS splits the picture among its threads, and its flow depends on where it cuts."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def places(flow: np.ndarray) -> np.ndarray:
    """Where each pixel arrives: (H, W, 2) float32, x and y."""
    height, width = flow.shape[:2]
    where = flow.copy()
    where[..., 0] += np.arange(width, dtype=np.float32)
    where[..., 1] += np.arange(height, dtype=np.float32)[:, None]
    return where


def sample_at(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Bilinear samples of (H, W, C) float32 at places (H, W, 2)."""
    import cv2

    # OpenCV's types have no None for the second map, which a map of pairs does not need
    return cv2.remap(picture, where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]


def visible_in_next(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Where a pixel carried forward and back comes home, and stays inside the picture; (H, W) bool.

    The test and its numbers are those of Ruder, Dosovitskiy and Brox (GCPR 2016): |f + b|^2 <= 0.01 (|f|^2 + |b|^2) + 0.5.
    """
    where = places(forward)
    back = sample_at(backward, where)
    height, width = forward.shape[:2]
    inside = (where >= 0).all(-1) & (where[..., 0] <= width - 1) & (where[..., 1] <= height - 1)
    lost = np.square(forward + back).sum(-1) > 0.01 * (np.square(forward).sum(-1) + np.square(back).sum(-1)) + 0.5
    return inside & ~lost


def motion_of(truth: Tensor) -> list[Motion]:
    """Motion between consecutive frames of a true clip (T, 3, H, W) uint8: OpenCV's DIS flow of the luma, medium preset.

    DIS (Kroeger et al., ECCV 2016) has no weights. It needs frames of 32 pixels or more.
    """
    import cv2

    grey = [cv2.cvtColor(np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy()), cv2.COLOR_RGB2GRAY) for frame in truth]
    with one_thread():
        dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        found = []
        for a, b in pairwise(grey):
            forward, backward = (dis.calc(i, j, np.zeros((*i.shape, 2), np.float32)) for i, j in ((a, b), (b, a)))
            found.append(Motion(forward, visible_in_next(forward, backward)))
    return found
