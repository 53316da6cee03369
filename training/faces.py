"""Where faces are in a crop: from the metadata's boxes, else from YuNet (OpenCV's FaceDetectorYN)."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCORE = 0.6  # that a face must reach


class FaceDetector:
    """Face masks of crops; the detector itself is made in the process that uses it, since it cannot be sent to another.

    Args:
        path: YuNet's .onnx, or None: then only the metadata's boxes count.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is needed, and OpenCV is not installed.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._made: tuple[int, Any] | None = None
        if path is None:
            return
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no face detector at {path}: give YuNet's .onnx by faces.detector=")
        try:
            import cv2  # noqa: F401
        except ImportError as error:
            message = "finding faces needs OpenCV: pip install 'fast-latent-decoders[train]', or set faces.weight=1"
            raise ImportError(message) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def boxes(self, picture: Tensor) -> np.ndarray:
        """(n, 4) float32, x0 y0 x1 y1 in px, of the faces in a picture (3, H, W) uint8."""
        import cv2

        if self._made is None or self._made[0] != os.getpid():
            cv2.setNumThreads(1)  # the workers are the threads; and a result must not depend on how many there are
            level = cv2.utils.logging.setLogLevel(
                cv2.utils.logging.LOG_LEVEL_ERROR
            )  # errors only: OpenCV 5 warns at each creation that it chooses its own target
            self._made = os.getpid(), cv2.FaceDetectorYN.create(str(self.path), "", (32, 32), SCORE)
            cv2.utils.logging.setLogLevel(level)
        detector = self._made[1]
        detector.setInputSize((picture.shape[2], picture.shape[1]))
        found = detector.detect(np.ascontiguousarray(picture.flip(0).permute(1, 2, 0).numpy()))[1]  # OpenCV's order is BGR
        if found is None:
            return np.zeros((0, 4), np.float32)
        return np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4]], axis=1).astype(np.float32)

    def mask(self, frames: Tensor, boxes: np.ndarray | None) -> Tensor:
        """True in faces: (T, 1, H, W) for frames (T, 3, H, W) uint8. `boxes` (n, 4) count for all frames; None asks the detector."""
        mask = torch.zeros(len(frames), 1, *frames.shape[2:], dtype=torch.bool)
        for frame, place in zip(frames, mask, strict=True):
            found = boxes
            if found is None:
                found = self.boxes(frame) if self.path else np.zeros((0, 4), np.float32)
            for x0, y0, x1, y1 in found.tolist():
                place[:, max(0, int(y0)) : max(0, round(y1)), max(0, int(x0)) : max(0, round(x1))] = True
        return mask
