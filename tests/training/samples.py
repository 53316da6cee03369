"""Pictures, clips and shards for the tests of the trainer's data layer."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .tiny import module


def source(path: object, **keys: Any) -> Any:
    return module("config").Source(path=str(path), **keys)


def stage(**keys: Any) -> Any:
    return module("config").Stage(**{"crop": 32, **keys})


def picture(level: int = 128, size: tuple[int, int] = (64, 48), format: str = "PNG", **save: Any) -> bytes:
    """A picture whose colour is about `level`, with some texture."""
    values = np.random.default_rng(level).integers(0, 9, (size[1], size[0], 3)) + min(level, 246)
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, format, **save)
    return buffer.getvalue()


def encoded(image: Image.Image, format: str, **save: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, format, **save)
    buffer.seek(0)
    return buffer


def clip(path: Path, frames: int = 30, level: int | None = None, codec: str = "mpeg4", size: tuple[int, int] = (64, 48)) -> Path:
    """A clip of which frame i has the grey value 4 i + 40, or `level` in all frames (with a gradient across)."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        ramp = np.linspace(0, 60, size[0])[None, :, None].repeat(size[1], 0).repeat(3, 2)
        for i in range(frames):
            values = np.full((size[1], size[0], 3), 4 * i + 40) if level is None else level + ramp
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


def shard(path: Path, members: dict[str, bytes | dict[str, Any]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = json.dumps(data).encode() if isinstance(data, dict) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def crops(
    sources: list[Any], count: int = 8, clips: bool = False, faces: Any = None, seed: tuple[int, ...] = (0,), **keys: Any
) -> Any:
    data = module("data")
    part = data.Sources(sources, "clips" if clips else "pictures").part(0)
    return data.Crops(part, stage(**keys), faces or module("config").Faces(), seed, count, clips)


def keys(sources: list[Any], kind: str = "pictures") -> list[str]:
    part = module("data").Sources(sources, kind).part(0)
    return [Path(entry.key.replace(":", "/")).stem for pool in part.pools for entry in pool.entries]
