"""Faster ways to the same picture: `optimize`, OpenVINO, and bytes made on the device."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from typer.testing import CliRunner

from fast_latent_decoders import FastDecoder
from fast_latent_decoders.cli import app
from fast_latent_decoders.engines import OpenVINOEngine, openvino_core
from fast_latent_decoders.files import write_latents

from .pipelines import tiny

pytest.importorskip("openvino")
NATIVE = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("family", ["subpixel", "tae", "efficientvit"])
def test_openvino_gives_torchs_picture_at_any_size(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = tiny.decoder(family).eval()
    sizes = [tiny.latents(n=n, height=h, width=w) for n, h, w in ((1, 8, 8), (2, 5, 11), (3, 1, 1))]
    with torch.inference_mode():
        wanted = [fast.decode(z).sample for z in sizes]
        assert fast.optimize("openvino", torch.float32) is fast
        made = [fast.decode(z).sample for z in sizes]
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert fast._engine is not None and len(fast._engine._compiled) == 1, "one compilation serves all sizes"


@pytest.mark.skipif(not NATIVE, reason="this processor has no bfloat16")
def test_openvino_in_bfloat16_is_as_near_as_torchs() -> None:
    fast, z = FastDecoder.from_pretrained("subpixel-sdxl").eval(), tiny.latents(height=16, width=16)
    with torch.inference_mode():
        wanted = fast.decode(z).sample
        made = fast.optimize("openvino").decode(z).sample
        half = FastDecoder.from_pretrained("subpixel-sdxl", torch_dtype=torch.bfloat16).decode(z).sample.float()
    assert (made - wanted).square().mean() < 2 * (half - wanted).square().mean()


def test_openvino_in_both_sockets_in_tiles_and_in_the_modules_dtype() -> None:
    fast, z = tiny.decoder("subpixel").eval(), tiny.latents(n=2, height=9, width=13)
    with torch.inference_mode():
        whole = fast.decode(z).sample
        calls = watch(fast.optimize("openvino", torch.float32))
        fast.enable_tiling(4)
        torch.testing.assert_close(fast.decode(z).sample, whole, rtol=0, atol=1e-4)
        assert len(calls) > 1
        vae = tiny.kl()
        vae.decoder = fast.inside(vae)
        before = len(calls)
        torch.testing.assert_close(vae.decode(z).sample, whole, rtol=0, atol=1e-4)
        assert len(calls) == before + 1
        assert fast.to(torch.bfloat16).decode(z).sample.dtype == torch.bfloat16


def test_gradients_and_training_go_back_to_torch(tmp_path: Any) -> None:
    fast, z = tiny.decoder("subpixel").eval().optimize("openvino"), tiny.latents()
    calls = watch(fast)
    fast.decode(z.requires_grad_()).sample.sum().backward()
    assert z.grad is not None
    fast.train().decode(z.detach())
    assert not calls
    fast.save_pretrained(tmp_path)
    assert torch.equal(FastDecoder.from_pretrained(tmp_path).decode(z).sample, fast.decode(z).sample)
    fast.eval().decode(z.detach())
    assert len(calls) == 1
    fast.optimize("torch", torch.float32).decode(z.detach())
    assert len(calls) == 1


def test_what_openvino_cannot_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="mixes the frames of a clip"):
        tiny.decoder("temporal").optimize("openvino")
    with pytest.raises(ValueError, match=r"computes in float32.*, got torch\.float16"):
        tiny.decoder().optimize("openvino", torch.float16)
    with pytest.raises(ValueError, match="expected the backend torch, compile or openvino, got 'tensorrt'"):
        tiny.decoder().optimize("tensorrt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is for CPUs"):
        tiny.decoder().to("meta").optimize("openvino")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_is_freed_is_kept() -> None:
    """After `optimize` no call faults in again what the one before it had: in a process of its own, since it stays so."""
    code = """
import resource, sys, torch
from fast_latent_decoders import SubpixelDecoder
fast = SubpixelDecoder((8, 8, 8), (1, 1, 1), 1).eval().requires_grad_(False)
if sys.argv[1] == "kept":
    fast.optimize(dtype=torch.float32)
z = torch.randn(1, 4, 224, 224)  # a picture of 39 MB: above 32 MiB glibc always maps, whatever its heap has grown to
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fast.decode(z)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[4:]))  # by then the heap has its size
"""
    given, kept = (int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout) for how in ("given", "kept"))
    assert kept < given / 10


def test_optimize_finds_a_dtype() -> None:
    fast = tiny.decoder().optimize()
    assert fast.dtype in (torch.float32, torch.bfloat16)
    assert fast.optimize(dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled() -> None:
    fast, z = tiny.decoder(), tiny.latents()
    whole = fast.decode(z).sample
    torch.testing.assert_close(fast.optimize("compile", torch.float32).decode(z).sample, whole, rtol=0, atol=1e-5)
    assert not any("_orig_mod" in name for name in fast.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_those_of_diffusers(dtype: torch.dtype) -> None:
    fast, z = tiny.decoder().to(dtype), 3 * tiny.latents(n=2, height=9, width=7)
    made = fast.decode_bytes(z)
    assert (made.dtype, tuple(made.shape)) == (torch.uint8, (2, 72, 56, 3))
    with torch.no_grad():
        pictures = VaeImageProcessor().postprocess(fast.decode(z).sample, output_type="pil")
    for mine, theirs in zip(made.numpy(), pictures, strict=True):
        assert np.array_equal(mine, np.array(theirs))


def test_the_command_line(tmp_path: Any) -> None:
    write_latents(tmp_path / "a.safetensors", torch.randn(4, 4, 5), "sdxl", "scaled")
    tiny.decoder("subpixel").save_pretrained(tmp_path / "decoder")
    words = ["decode", str(tmp_path / "a.safetensors"), "--decoder", str(tmp_path / "decoder"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--backend", "openvino", "--dtype", "float32", "--json"])
    assert done.exit_code == 0, done.output
    assert '"dtype": "float32"' in done.output and (tmp_path / "out" / "a.png").exists()
    wrong = CliRunner().invoke(app, [*words, "--backend", "openvino", "--dtype", "float16"])
    assert wrong.exit_code == 2 and "--backend openvino: " in wrong.output
    timed = CliRunner().invoke(app, ["bench", str(tmp_path / "decoder"), "--size", "64", "--mode", "openvino", "--dtype", "float32", "--repeats", "1"])
    assert timed.exit_code == 0 and "fp32 openvino" in timed.output


def watch(fast: FastDecoder) -> list[torch.Size]:
    """The shapes that the engine is called with from now on."""
    shapes: list[torch.Size] = []
    engine = fast._engine
    assert engine is not None

    class Watched(OpenVINOEngine):
        def __call__(self, z: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
            shapes.append(z.shape)
            return super().__call__(z, num_frames)

    engine.__class__ = Watched
    return shapes


def test_a_signal_after_engines_have_gone() -> None:
    """Cores that are freed in another order than they were made leave no signal stack, and a DataLoader's workers end with a signal."""
    code = """
import signal, subprocess
from fast_latent_decoders import SubpixelDecoder
signal.signal(signal.SIGCHLD, lambda *_: None)  # as a DataLoader with workers does
first, second = (SubpixelDecoder((8, 8, 8), (1, 1, 1), 1).eval().optimize("openvino") for _ in range(2))
del first
del second
subprocess.run(["true"], check=True)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("alive\n"), (done.returncode, done.stderr)
