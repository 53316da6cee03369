"""Decoding in bounded memory: in strips where the network can, else in tiles, exact where the receptive field is finite, else blended."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .engines import OpenVINOEngine
from .networks.blocks import BlockNetwork
from .strips import SPATIAL_FACTOR, Unsupported, decode_strips


def decode_tiled(network: BlockNetwork | OpenVINOEngine, z: Tensor, num_frames: int | None, tile_size: int) -> Tensor:
    """Scaled latents (N, C, h, w) to pictures (N, 3, 8h, 8w), about `tile_size` x `tile_size` latents at a time.

    Strips of as many latents cost no more arithmetic than the whole decode, and are exact. Where they cannot be had, a tile is decoded together with the latents its pixels can see (`BlockNetwork.halo`) and cut back, so that nothing is
    blended and the picture equals the untiled one. Networks with global attention have no such halo: their tiles overlap
    by a quarter and are blended, which changes the picture, and a warning says so.
    """
    height, width = z.shape[2:]
    if tile_size >= max(height, width):
        return network(z, num_frames)
    try:
        if isinstance(network, OpenVINOEngine):
            raise Unsupported  # it is compiled as a whole
        return decode_strips(network, z, max(1, tile_size**2 // min(height, width)))
    except Unsupported:
        pass
    halo = network.halo()
    if halo is None:
        return _blended(network, z, num_frames, tile_size)
    sample: Tensor | None = None
    for top, bottom in _spans(height, tile_size):
        for left, right in _spans(width, tile_size):
            y0, x0 = max(0, top - halo), max(0, left - halo)
            tile = network(z[:, :, y0 : bottom + halo, x0 : right + halo], num_frames)
            if sample is None:  # the network's own dtype (CONTRACT 7.10: AutoencoderTiny's buffer is float32 whatever the model)
                sample = tile.new_empty(len(z), tile.shape[1], height * SPATIAL_FACTOR, width * SPATIAL_FACTOR)
            sample[:, :, _pixels(top, bottom), _pixels(left, right)] = tile[
                :, :, _pixels(top - y0, bottom - y0), _pixels(left - x0, right - x0)
            ]
    assert sample is not None
    return sample


def _pixels(start: int, stop: int) -> slice:
    return slice(start * SPATIAL_FACTOR, stop * SPATIAL_FACTOR)


def _spans(length: int, size: int, step: int | None = None) -> Iterator[tuple[int, int]]:
    """Spans of `size` latents that cover 0..length; the last one is cut short, or moved back where spans overlap."""
    for start in range(0, length, step or size):
        yield (start, min(start + size, length)) if step is None else (max(0, min(start, length - size)), min(start + size, length))
        if start + size >= length:
            return


def _blended(network: BlockNetwork | OpenVINOEngine, z: Tensor, num_frames: int | None, tile_size: int) -> Tensor:
    warnings.warn(
        f"{type(network).__name__} sees the whole picture, so its tiles differ from the untiled picture; overlaps are blended. "
        "Decode without tiling, or use a decoder with a finite receptive field, for exact tiles.",
        stacklevel=2,
    )
    height, width = z.shape[2:]
    overlap = max(1, tile_size // 4)
    size = (len(z), 3, height * SPATIAL_FACTOR, width * SPATIAL_FACTOR)
    total, weights = z.new_zeros(size, dtype=torch.float32), z.new_zeros(1, 1, *size[2:], dtype=torch.float32)
    dtype = z.dtype
    for top, bottom in _spans(height, tile_size, tile_size - overlap):
        for left, right in _spans(width, tile_size, tile_size - overlap):
            tile = network(z[:, :, top:bottom, left:right], num_frames)
            dtype = tile.dtype
            weight = _ramp(bottom - top, overlap, z.device)[:, None] * _ramp(right - left, overlap, z.device)
            total[:, :, _pixels(top, bottom), _pixels(left, right)] += tile.float() * weight
            weights[:, :, _pixels(top, bottom), _pixels(left, right)] += weight
    return (total / weights).to(dtype)


def _ramp(length: int, overlap: int, device: torch.device) -> Tensor:
    """Weights that rise and fall over the overlaps; never zero, so that the picture's border is defined."""
    n = length * SPATIAL_FACTOR
    distance = torch.arange(1, n + 1, device=device, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp_max(overlap * SPATIAL_FACTOR)
