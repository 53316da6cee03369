"""Weights that metric packages do not carry: fetched once, quickly given up without a network, never tried twice."""

import re
import socket
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

TIMEOUT = 10  # seconds without an answer; torch.hub itself would wait for ever
INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"

_unreachable: dict[str, str] = {}  # hosts that did not answer: the next file of theirs is not tried


class Unavailable(Exception):
    """Why a metric cannot be had; str() begins with "not available: "."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not available: {reason}")


@contextmanager
def needing(package: str) -> Iterator[None]:
    """Turns a failed import of an optional package into `Unavailable` that names the extra."""
    try:
        yield
    except (ImportError, RuntimeError, AttributeError, OSError) as error:  # torchvision beside another torch fails in any of these ways
        raise Unavailable(f"{package} cannot be imported ({error}); pip install 'fast-latent-decoders[eval]'") from error


def torchvision_url(backbone: str) -> str:
    """Where torchvision's ImageNet weights of "alexnet", "vgg16" or "squeezenet1_1" are: those that LPIPS and DISTS are built on."""
    with needing("torchvision"):
        from torchvision.models import get_model_weights

    return str(get_model_weights(backbone)["IMAGENET1K_V1"].url)


def fetch(url: str) -> Path:
    """The file of a URL in torch.hub's cache, downloaded if it is not there; its name ends in the first digits of its SHA-256.

    Raises:
        Unavailable: it cannot be downloaded; said at once when its host has already failed in this process.
    """
    result = _fetch(url, torch.hub.get_dir())
    if isinstance(result, str):
        raise Unavailable(result)
    return result


@cache
def _fetch(url: str, hub: str) -> Path | str:
    host, name = url.split("/")[2], url.split("/")[-1]
    path = Path(hub) / "checkpoints" / name
    if path.exists():
        return path
    if host in _unreachable:
        return f"{name} cannot be downloaded ({_unreachable[host]})"
    digest = re.search(r"-([a-f0-9]{8,})\.", name)
    before = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(TIMEOUT)
        torch.hub.download_url_to_file(url, str(path), digest[1] if digest else None, progress=False)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; a wrong checksum is a RuntimeError
        if isinstance(error, OSError) and not isinstance(error, urllib.error.HTTPError):
            _unreachable[host] = f"{host}: {error}"
        return f"{name} cannot be downloaded ({host}: {error})"
    finally:
        socket.setdefaulttimeout(before)
    return path
