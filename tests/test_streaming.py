"""Clips frame by frame: streams equal the whole clip for any split, and take no more memory the longer they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fast_latent_decoders import SubpixelDecoder, SubpixelTemporalDecoder, stream_frames, swap_decoder
from fast_latent_decoders.networks import streaming
from fast_latent_decoders.pictures import to_bytes
from tests.pipelines import tiny
from tests.test_memory import told


def clips(n: int = 2, frames: int = 7) -> Tensor:
    return tiny.latents("sd", n=n * frames, height=5, width=6).unflatten(0, (n, frames))


@torch.no_grad()
def whole(fast: Any, z: Tensor) -> Tensor:
    return fast.decode(z.flatten(0, 1), num_frames=z.shape[1]).sample.unflatten(0, z.shape[:2])


def streamed(fast: Any, latents: Any, state: Any = None) -> tuple[Tensor, Any]:
    given = list(fast.decode_stream(latents, state))
    return torch.stack([frame for frame, _ in given], 1), given[-1][1]


@pytest.mark.parametrize("family", ["streaming", "subpixel", "tae"])
@pytest.mark.parametrize("cuts", [(7,), (1, 6), (3, 1, 3), (1,) * 7])
def test_any_split_of_a_stream_gives_the_whole_clip(family: str, cuts: tuple[int, ...]) -> None:
    fast, z = tiny.decoder(family, "sd"), clips()
    parts, state = [], None
    for part in z.split(cuts, dim=1):
        frames, state = streamed(fast, part, state)
        parts.append(frames)
    torch.testing.assert_close(torch.cat(parts, 1), whole(fast, z), rtol=0, atol=2e-6)
    torch.testing.assert_close(streamed(fast, z.split(cuts, dim=1))[0], whole(fast, z), rtol=0, atol=2e-6)


def test_a_stream_can_be_gone_on_from_twice() -> None:
    """Nothing is hidden: the state decides, whatever was decoded in between."""
    fast, z = tiny.decoder("streaming", "sd"), clips(1)
    _, state = streamed(fast, z[:, :3])
    first, _ = streamed(fast, z[:, 3:], state)
    streamed(fast, clips(1) * 2)
    torch.testing.assert_close(streamed(fast, z[:, 3:], state)[0], first, rtol=0, atol=0)
    torch.testing.assert_close(first, whole(fast, z)[:, 3:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_long_clip_goes_through_in_parts(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    fast, z = tiny.decoder("streaming", "sd"), clips()
    expected = whole(fast, z)
    monkeypatch.setattr(streaming, "PIXELS", at_once * 2 * 64 * 5 * 6)
    torch.testing.assert_close(whole(fast, z), expected, rtol=0, atol=2e-6)


def test_frames_see_the_past_of_their_own_clip_only() -> None:
    fast, z = tiny.decoder("streaming", "sd"), clips()
    expected = whole(fast, z)
    changed = z.clone()
    changed[0, 3] += 1
    difference = (whole(fast, changed) - expected).abs().amax((2, 3, 4))
    assert (difference[0] > 1e-3).tolist() == [False, False, False, True, True, True, False]  # two memory blocks: two frames on
    assert difference[1].max() == 0
    assert (fast.decode(z.flatten(0, 1)).sample - expected.flatten(0, 1)).abs().max() > 0.01


def test_a_new_memory_ignores_the_past() -> None:
    torch.manual_seed(0)
    fast, z = SubpixelTemporalDecoder((16, 8, 8), (1, 1, 1), memory=(1, 1, 1)).eval(), clips()
    with torch.no_grad():
        torch.testing.assert_close(fast.decode(z.flatten(0, 1)).sample, whole(fast, z).flatten(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_past", [False, True])
def test_a_memory_reads_the_frame_and_the_one_before_it_side_by_side(with_past: bool) -> None:
    torch.manual_seed(0)
    conv = streaming.MemoryConv(3)
    clips, past = torch.randn(2, 4, 3, 5, 6), torch.randn(2, 1, 3, 5, 6)
    before = torch.cat([past if with_past else torch.zeros_like(past), clips[:, :-1]], 1)
    expected = torch.nn.functional.conv2d(torch.cat([clips, before], 2).flatten(0, 1), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(clips.flatten(0, 1), 4, past[:, 0] if with_past else None), expected)


def test_gradients_reach_the_past() -> None:
    fast, z = tiny.decoder("streaming", "sd"), clips().requires_grad_()
    fast.decode(z.flatten(0, 1), num_frames=7).sample.unflatten(0, (2, 7))[0, 4].sum().backward()
    assert (z.grad.abs().amax((2, 3, 4)) > 0).tolist() == [[False, False, True, True, True, False, False], [False] * 7]


def test_wrong_calls_are_sentences() -> None:
    fast, z = tiny.decoder("streaming", "sd"), clips()
    _, state = streamed(fast, z)
    for latents, given, said in (
        (z[:1], state, "state of as many clips"),
        (z, state[:1], "state of this network, 2 tensors; got 1"),
        (z[0, 0], None, "expected latents"),
        (z[:, :, :3], None, "floating-point latents"),
    ):
        with pytest.raises(ValueError, match=said):
            streamed(fast, latents, given)
    with pytest.raises(ValueError, match="whole clips"):
        fast.decode(z.flatten(0, 1), num_frames=5)
    with pytest.raises(TypeError, match="whole clip at once"):
        streamed(tiny.decoder("temporal", "sd"), z)
    with pytest.raises(ValueError, match="memory blocks"):
        SubpixelTemporalDecoder(blocks=(1, 1, 1), memory=(2, 0, 0))


@pytest.mark.parametrize("way", ["whole", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frames_of_a_pipeline(way: str, dtype: torch.dtype) -> None:
    """As its own clip of all frames at once."""
    expected = tiny.run(_svd(way, dtype), num_videos_per_prompt=2, output_type="pil")
    inputs = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": 4, "num_inference_steps": 2, "num_videos_per_prompt": 2}
    frames = list(stream_frames(_svd(way, dtype), tiny.still(), **inputs, generator=torch.Generator().manual_seed(0)))
    assert [len(pictures) for pictures in frames] == [2] * 4
    for i, clip in enumerate(expected):
        for t, picture in enumerate(clip):
            difference = np.asarray(picture).astype(int) - np.asarray(frames[t][i])
            assert np.abs(difference).max() <= 1


def _svd(way: str, dtype: torch.dtype) -> Any:
    pipe, fast = tiny.svd(dtype), tiny.decoder("streaming", "sd").to(dtype)
    if way == "whole":
        pipe.vae = fast.with_encoder(pipe.vae)
    else:
        swap_decoder(pipe, fast)
    return pipe


@pytest.mark.parametrize("way", ["whole", "swapped"])
def test_frames_of_animatediff(way: str) -> None:
    """Its VAE has a `post_quant_conv`, and its latents come as (1, C, frames, h, w)."""
    inputs = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": 3, "num_inference_steps": 1}

    def pipe() -> Any:
        made, fast = tiny.animatediff(), tiny.decoder("streaming", "sd")
        if way == "whole":
            made.vae = fast
        else:
            swap_decoder(made, fast)
        return made

    frames = list(stream_frames(pipe(), "a cat", **inputs, generator=torch.Generator().manual_seed(0)))
    latents = pipe()("a cat", **inputs, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    with torch.no_grad():
        expected = tiny.decoder("streaming", "sd").decode(latents.transpose(1, 2).flatten(0, 1) / 0.18215, num_frames=3).sample
    for frame, (shown,) in zip(expected, frames, strict=True):
        assert np.abs(to_bytes(frame).astype(int) - np.asarray(shown)).max() <= 1


def test_a_stock_pipeline_does_not_stream() -> None:
    with pytest.raises(TypeError, match="swap_decoder"):
        next(stream_frames(tiny.svd()))


@pytest.mark.parametrize("whole", [True, False])
def test_a_decoder_of_whole_clips_is_refused_before_the_denoising(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.svd()
    decoder = tiny.decoder("temporal", "sd")
    if whole:
        pipe.vae = decoder
    else:
        swap_decoder(pipe, decoder)
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("it denoised"))
    with pytest.raises(TypeError, match="needs the whole clip at once: call the pipeline itself, with decode_chunk_size"):
        next(stream_frames(pipe, tiny.still()))


MEASURE = """
import sys
from pathlib import Path
import torch
from fast_latent_decoders import SubpixelTemporalDecoder

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

fast, z = SubpixelTemporalDecoder(encoder="none").eval(), torch.zeros(int(sys.argv[1]), 4, 16, 16)
for _ in fast.decode_stream(z[:2]):
    pass
before = peak()
for _ in fast.decode_stream(z):
    pass
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark from /proc")
def test_memory_is_flat_in_the_number_of_frames() -> None:
    grown = [told(MEASURE, n) for n in (14, 200)]
    print(f"\n128x128, float32, above two frames: {grown[0]:.1f} MB for 14 frames, {grown[1]:.1f} MB for 200")
    assert max(grown) < 10  # a frame is 0.2 MB: 200 kept ones would be 39


def test_it_grows_from_the_decoder_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "training"))
    import grow

    torch.manual_seed(0)
    source = SubpixelDecoder((12, 8, 8), (2, 1, 1), 3, "tae", latent_space="sd")
    target = SubpixelTemporalDecoder((16, 8, 8), (2, 1, 1), 3, "tae", (2, 1, 0))
    grow.grow(source, target)
    z = clips()
    with torch.no_grad():
        torch.testing.assert_close(whole(target, z), whole(source, z), rtol=0, atol=1e-5)
