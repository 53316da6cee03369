"""Networks that turn windows of consecutive frames into embeddings, for Frechet distances between videos.

Windows are (N, T, 3, H, W) uint8, decoded or true; embeddings (N, D) float32. Both sides go through one resize. Windows of one video
are not independent, so every embedding keeps the name of its video and intervals are drawn over videos.

| name        | network             | D    | frames | resize to 224x224               | input   | figure                                  |
|-------------|---------------------|------|--------|---------------------------------|---------|-----------------------------------------|
| i3d         | I3D, Kinetics-400   | 400  | 16     | bilinear, no antialiasing       | [-1, 1] | classic FVD (Unterthiner et al. 2018)   |
| cd-fvd      | VideoMAE V2, ViT-g  | 1408 | 16     | bilinear, no antialiasing       | [0, 1]  | content-debiased FVD (Ge et al. 2024)   |
| videomae-v2 | VideoMAE V2, ViT-g  | 1408 | 8      | bicubic, antialiased            | [0, 1]  | ours; comparable to no published figure |

All squash the frame to a square. Frames come as they are; cd-fvd's own loader would first resize and crop them to its `resolution`, as
its published statistics do. No network is downloaded here: what is not on the disk is not available, and the reason says where
it is to be had.
"""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_latent_decoders.evaluation import i3d

SIDE = 224  # pixels; of both networks
VIDEOMAE_REPO = "OpenGVLab/InternVideoMAE_models"  # where cd-fvd itself downloads them from
VIDEOMAE_FILE = "mae-g/vit_g_hybrid_pt_1200e_ssv2_ft.pth"  # ViT-g, a billion parameters, finetuned on Something-Something V2
VIDEOMAE_HOW = f"run hf download {VIDEOMAE_REPO} {VIDEOMAE_FILE}, or give the path of that file"


@dataclass(frozen=True)
class VideoFeatures:
    """Windows (N, frames, 3, H, W) uint8 to embeddings (N, dim) float32 on the CPU.

    Args:
        name: as in VIDEO_FEATURES.
        title: of the Frechet distance on these embeddings.
        protocol: one sentence for the table's footnote: network, layer, frames, resize.
        frames: consecutive frames of a window.
        dim: of an embedding; a distance needs more independent windows than this.
        embed: windows on `device` to embeddings.
        batch: windows in one pass.
    """

    name: str
    title: str
    protocol: str
    frames: int
    dim: int
    embed: Callable[[Tensor], Tensor]
    device: torch.device
    batch: int = 4

    @torch.no_grad()
    def __call__(self, windows: Tensor) -> Tensor:
        if windows.ndim != 5 or windows.shape[1:3] != (self.frames, 3) or windows.dtype != torch.uint8:
            got = f"{tuple(windows.shape)} of {windows.dtype}"
            raise ValueError(f"expected windows (N, {self.frames}, 3, H, W) of uint8, got {got}")
        found = [self.embed(part.to(self.device)).float().cpu() for part in windows.split(self.batch) if len(part)]
        return torch.cat(found) if found else torch.empty(0, self.dim)


# ---------------------------------------------------------------- windows


def cut_windows(clip: Tensor, frames: int, stride: int | None = None) -> Tensor:
    """A clip (T, 3, H, W) as views of consecutive frames (N, frames, 3, H, W), one every `stride` (one after the other by default).

    What is left at the end is not used; a clip that is too short gives no window (N = 0).
    """
    stride = frames if stride is None else stride
    if frames < 1 or stride < 1:
        raise ValueError(f"windows and strides have at least one frame, got frames={frames}, stride={stride}")
    if len(clip) < frames:
        return clip.new_empty(0, frames, *clip.shape[1:])
    return clip.unfold(0, frames, stride).movedim(-1, 1)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of several videos: row i is a window of the video `owners[i]`; `skipped` has the reason for each without a window."""

    features: Tensor  # (n, D)
    owners: list[str]
    skipped: dict[str, str]

    def by_video(self) -> dict[str, Tensor]:
        """Rows (m, D) of each video, in order: what a bootstrap draws from."""
        rows: dict[str, list[int]] = {}
        for i, owner in enumerate(self.owners):
            rows.setdefault(owner, []).append(i)
        return {owner: self.features[held] for owner, held in rows.items()}

    def resampled(self, generator: torch.Generator) -> Tensor:
        """As many videos as there are, drawn with replacement, each with all of its windows: one draw of a bootstrap, (m, D)."""
        videos = list(self.by_video().values())
        drawn = torch.randint(len(videos), (len(videos),), generator=generator).tolist()
        return torch.cat([videos[i] for i in drawn])


def embed_videos(extractor: VideoFeatures, videos: Iterable[tuple[str, Tensor]], stride: int | None = None) -> Embeddings:
    """Embeddings of the windows of named clips (T, 3, H, W) uint8, one clip in memory at a time.

    Decoded and true clips of one name have windows at the same places, so that one generator's seed draws the same videos from both.

    Raises:
        ValueError: a name comes twice.
    """
    parts: list[Tensor] = []
    owners: list[str] = []
    skipped: dict[str, str] = {}
    seen: set[str] = set()
    for name, clip in videos:
        if name in seen:
            raise ValueError(f"two videos are called {name}")
        seen.add(name)
        windows = cut_windows(clip, extractor.frames, stride)
        if not len(windows):
            skipped[name] = f"{len(clip)} frames, {extractor.name} needs {extractor.frames}"
        parts.append(extractor(windows))
        owners += [name] * len(windows)
    return Embeddings(torch.cat(parts) if parts else torch.empty(0, extractor.dim), owners, skipped)


# ---------------------------------------------------------------- networks


def open_classic(device: torch.device, path: str | Path | None, frames: int) -> VideoFeatures:
    """I3D. The layer is the mean of the 400 logits over time: what FVD was defined on (the TF-Hub module's RGB/inception_i3d/Mean)
    and nearly all published values use; the 1024 channels before it give another scale."""
    network = i3d.open_i3d(path).to(device)
    return VideoFeatures(
        name="i3d",
        title="FVD (I3D)",
        protocol=f"I3D Kinetics-400 logits, {frames} consecutive frames, bilinear to {SIDE}x{SIDE} without antialiasing",
        frames=frames,
        dim=i3d.CLASSES,
        embed=lambda windows: network(i3d.to_i3d(windows)),
        device=device,
    )


def to_videomae(windows: Tensor, debiased: bool) -> Tensor:
    """Windows (N, T, 3, H, W) uint8 to (N, 3, T, 224, 224) in [0, 1].

    Args:
        debiased: as cd-fvd does, bilinear without antialiasing; else bicubic with it, clamped.
    """
    frames = windows.flatten(0, 1).float() / 255
    if debiased:
        frames = F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    else:
        frames = F.interpolate(frames, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return frames.unflatten(0, windows.shape[:2]).transpose(1, 2)


def open_videomae(name: str, device: torch.device, path: str | Path | None, frames: int) -> VideoFeatures:
    """VideoMAE V2 by the package cd-fvd: the mean of the tokens, normed. It takes frames in twos, and its positions in time are those
    of 16 frames; for any other number the package interpolates them."""
    import argparse

    from huggingface_hub import try_to_load_from_cache

    try:
        from cdfvd.third_party.VideoMAEv2 import utils
    except ImportError as error:
        raise ModuleNotFoundError(f"it needs the package cd-fvd: pip install cd-fvd==0.1.1 ({error})") from error
    own = Path(utils.__file__).with_name(Path(VIDEOMAE_FILE).name)
    cached = try_to_load_from_cache(VIDEOMAE_REPO, VIDEOMAE_FILE)
    place = Path(path) if path else Path(cached) if isinstance(cached, str) and not own.is_file() else own
    if not place.is_file():  # the package would download it, with no time limit and no check of what comes
        raise FileNotFoundError(f"the weights of VideoMAE V2 are not {f'at {place}' if path else 'there'}: {VIDEOMAE_HOW}")
    with torch.serialization.safe_globals([argparse.Namespace]):  # what a training checkpoint may hold beside tensors
        network = utils.load_videomae_model(device, str(place)).eval().requires_grad_(False)
    debiased = name == "cd-fvd"
    resize = "bilinear without antialiasing" if debiased else "bicubic with antialiasing"
    positions = "" if frames == 16 else ", positions in time interpolated from 16 frames (comparable to no published value)"
    return VideoFeatures(
        name=name,
        title="content-debiased FVD" if debiased else f"Frechet distance (VideoMAE V2, {frames} frames)",
        protocol=f"VideoMAE V2 ViT-g (SSv2) mean token, {frames} consecutive frames{positions}, {resize} to {SIDE}x{SIDE}",
        frames=frames,
        dim=network.embed_dim,
        embed=lambda windows: network.forward_features(to_videomae(windows, debiased)),
        device=device,
        batch=1,
    )


# What a missing or damaged file or package of others raises: the reason, not the end of a report.
CANNOT = (ImportError, OSError, EOFError, LookupError, RuntimeError, ValueError, pickle.UnpicklingError)
VIDEO_FEATURES = {"i3d": 16, "cd-fvd": 16, "videomae-v2": 8}  # frames of a window


def open_video_features(
    name: str, device: str | torch.device = "cpu", path: str | Path | None = None, *, frames: int | None = None
) -> tuple[VideoFeatures | None, str | None]:
    """The extractor, or None and the reason why it cannot be had; nothing is downloaded.

    Args:
        name: a key of VIDEO_FEATURES.
        path: of the weights: for "i3d" see `i3d.weights_content`, for the others the .pth; None looks where the packages and the Hub keep them.
        frames: of a window, if not the name's own; cd-fvd's published values are with 16.

    Raises:
        ValueError: there is no such name, or the network cannot take so many frames.
    """
    if name not in VIDEO_FEATURES:
        raise ValueError(f"there are no video features {name}; there are {', '.join(VIDEO_FEATURES)}")
    length = VIDEO_FEATURES[name] if frames is None else frames
    if name == "i3d" and length < i3d.LEAST_FRAMES:
        raise ValueError(f"I3D halves time three times and needs windows of at least {i3d.LEAST_FRAMES} frames, got {length}")
    if name != "i3d" and (length < 2 or length % 2):
        raise ValueError(f"VideoMAE V2 takes frames in twos, got windows of {length}")
    try:
        if name == "i3d":
            return open_classic(torch.device(device), path, length), None
        return open_videomae(name, torch.device(device), path, length), None
    except CANNOT as error:
        return None, str(error).split("\n")[0] or type(error).__name__
