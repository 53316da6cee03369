"""Peak memory of a 1024x1024 decode, whole and in tiles; run with -s to see the figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fast_latent_decoders

MEASURE = """
import sys
from pathlib import Path
import torch
from fast_latent_decoders import SubpixelDecoder
from tests.pipelines import tiny

def peak():  # of this process alone; ru_maxrss would remember the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

way, tile_size = sys.argv[1], int(sys.argv[2])
fast = SubpixelDecoder(encoder="none").eval()  # the default shape
vae = fast
if way == "socket B":
    vae = tiny.kl()
    vae.decoder = fast.inside(vae)
if tile_size:
    vae.enable_tiling()
    (fast if way == "socket A" else vae.decoder).tile_size = tile_size
z = torch.zeros(1, 4, 128, 128)
with torch.inference_mode():
    vae.decode(torch.zeros(1, 4, 8, 8))  # kernels and their tables
    before = peak()
    vae.decode(z)
print(peak() - before)
"""


def told(script: str, *arguments: object) -> float:
    """The last number that a script prints, in a process of its own."""
    root = Path(fast_latent_decoders.__file__).parents[1]
    # Blocks of a megabyte and more go back at once: how many of them glibc keeps otherwise (up to 32 MB each, and the more the later)
    # differs from run to run by as much as a strip takes.
    environment = {**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, check=True, env=environment, cwd=root, capture_output=True, text=True)
    return float(result.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark from /proc")
@pytest.mark.parametrize("way", ["socket A", "socket B"])
def test_tiles_take_less_memory(way: str) -> None:
    # Megabytes (2**20) above what imports, weights and a small decode take; tile size 0: whole.
    figures = {tile_size: told(MEASURE, way, tile_size) for tile_size in (0, 64, 32)}
    whole, large, small = figures.values()
    print(f"\n1024x1024, float32, {way}: whole {whole:.0f} MB, tiles of 64 latents {large:.0f} MB, of 32 {small:.0f} MB")
    assert small < large < whole
