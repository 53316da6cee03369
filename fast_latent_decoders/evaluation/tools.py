"""What measures, opened by name; what cannot be had is told of, never dropped or replaced."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .features import open_features
from .info import MetricInfo
from .metrics import METRICS, open_metrics
from .run import Network, Tools
from .temporal import VIDEO_METRICS, open_video_metrics
from .video_features import VideoFeatures, cut_windows, open_video_features


class Windows:
    """A network of clips as one of samples: a clip gives a row of features for each whole window of its frames."""

    def __init__(self, network: VideoFeatures) -> None:
        self.network, self.d, self.title = network, network.dim, network.title

    def extract(self, clip: Tensor) -> Tensor:
        """(T, 3, H, W) uint8 to (windows, d); none where the clip is shorter than a window."""
        windows = cut_windows(clip, self.network.frames)
        return self.network(windows) if len(windows) else torch.zeros(0, self.d)


def open_tools(metrics: Sequence[str], features: Sequence[str], clips: bool, device: str, chunk: int | None = None) -> tuple[Tools, dict[str, MetricInfo], dict[str, str], dict[str, str]]:
    """The tools, what their metrics are called, titles of the feature networks, and for what is not there the reason.

    Raises:
        ValueError: a name is not that of a metric or network.
    """
    opened, unavailable = open_metrics(metrics, device)
    video, missing = open_video_metrics([name for name in VIDEO_METRICS if chunk or name != "join_error"], chunk=chunk) if clips else ({}, {})
    unavailable |= missing
    networks: dict[str, Network] = {}
    for name in features:
        if clips:
            network, why = open_video_features(name, device)
            found: Any = Windows(network) if network else str(why)
        else:
            found = open_features(name, device)
        if isinstance(found, str):
            unavailable[name] = found
        else:
            networks[name] = found
    unavailable = {name: why.removeprefix("not available: ") for name, why in unavailable.items()}  # reports say it themselves
    every = {**METRICS, **VIDEO_METRICS}
    infos = {name: every[name] for name in (*opened, *video)}
    return Tools(opened, video, networks), infos, {name: network.title for name, network in networks.items()}, unavailable
