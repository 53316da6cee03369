"""Tiles: exact where the receptive field is finite, at any size; blended, with a warning, where it is not."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fast_latent_decoders import tiling
from fast_latent_decoders.networks.blocks import BlockNetwork
from fast_latent_decoders.strips import Unsupported, decode_strips
from fast_latent_decoders.tiling import decode_tiled
from tests.pipelines import tiny

NO_STRIPS = ("tae-bilinear", "streaming")  # bilinear upsampling looks at neighbours, memory blocks at the frame before
SIZES = [(9, 9, 4), (13, 11, 5), (5, 17, 3), (8, 23, 8), (7, 7, 1), (6, 30, 7)]  # height, width, tile size


def assert_ulp(tiled: Tensor, whole: Tensor) -> None:
    """Equal to one unit in the last place of numbers around the picture's largest."""
    unit = torch.finfo(whole.dtype).eps * 2 ** torch.floor(torch.log2(whole.abs().max())).item()
    assert (tiled.float() - whole.float()).abs().max() <= unit


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """No strips."""

    def refuse(*_: Any) -> None:
        raise Unsupported

    monkeypatch.setattr(tiling, "decode_strips", refuse)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("family", tiny.LOCAL)
@pytest.mark.parametrize(("height", "width", "tile_size"), SIZES)
class TestExact:
    """Through socket A and, with the VAE's own blending out of the way, through socket B."""

    def test_socket_a(self, family: str, height: int, width: int, tile_size: int) -> None:
        fast, z = tiny.decoder(family), tiny.latents(n=2, height=height, width=width)
        whole = fast.decode(z).sample
        fast.enable_tiling(tile_size)
        windows = watch(fast.decoder)
        torch.testing.assert_close(fast.decode(z).sample, whole, rtol=0, atol=1e-6)
        halo = fast.decoder.halo()
        assert halo is not None
        assert max(max(window) for window in windows) <= tile_size + 2 * halo
        fast.disable_tiling()
        assert torch.equal(fast.decode(z).sample, whole)

    def test_socket_b(self, family: str, height: int, width: int, tile_size: int) -> None:
        vae, z = tiny.kl(sample_size=8 * tile_size), tiny.latents(n=2, height=height, width=width)
        vae.decoder = tiny.decoder(family).inside(vae)
        vae.decoder.tile_size = tile_size
        with torch.no_grad():
            whole = vae.decode(z).sample
            vae.enable_tiling()
            torch.testing.assert_close(vae.decode(z).sample, whole, rtol=0, atol=1e-6)
            vae.disable_tiling()
            assert torch.equal(vae.decode(z).sample, whole)


@pytest.mark.parametrize("family", tiny.LOCAL)
@pytest.mark.parametrize(("height", "width", "tile_size"), SIZES)
def test_strips_are_exact(family: str, height: int, width: int, tile_size: int) -> None:
    fast, z = tiny.decoder(family), tiny.latents(n=2, height=height, width=width)
    whole = fast.decode(z).sample
    size = max(1, tile_size**2 // min(height, width))
    try:
        torch.testing.assert_close(decode_strips(fast.decoder, z * fast.latent_space.scaling_factor, size), whole, rtol=0, atol=1e-6)
    except Unsupported:
        assert family in NO_STRIPS
        return
    assert family not in NO_STRIPS
    windows = watch(fast.decoder)
    fast.enable_tiling(tile_size)
    torch.testing.assert_close(fast.decode(z).sample, whole, rtol=0, atol=1e-6)
    assert not windows or size >= max(height, width)


def test_a_strip_needs_a_strips_memory() -> None:
    """No layer ever sees more than its strip and, at the end, what waited in the layers before it."""
    fast, z = tiny.decoder("subpixel"), tiny.latents(height=64, width=4)
    first, *_, last = (watch(module) for module in fast.decoder.modules() if isinstance(module, nn.Conv2d))
    decode_strips(fast.decoder, z, 2)
    assert max(rows for rows, _ in first) <= 2 + 2
    assert max(rows for rows, _ in last[:-1]) <= 4 * 2 + 2
    assert last[-1][0] <= 4 * (2 + fast.decoder.halo()) + 2


def test_hooks_that_move_blocks_get_tiles() -> None:
    fast = tiny.decoder("subpixel")
    fast.decoder.layers[1]._diffusers_hook = object()
    with pytest.raises(Unsupported):
        decode_strips(fast.decoder, tiny.latents(height=9, width=9), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.LOCAL)
def test_half_types_agree_to_one_unit_in_the_last_place(family: str, dtype: torch.dtype) -> None:
    z = tiny.latents(n=1, height=13, width=11)
    fast = tiny.decoder(family).to(dtype)
    whole = fast.decode(z).sample
    fast.enable_tiling(5)
    tiled = fast.decode(z).sample
    assert tiled.dtype == dtype
    assert_ulp(tiled, whole)
    vae = tiny.kl(dtype=dtype, sample_size=40)
    vae.decoder = fast.inside(vae)
    with torch.no_grad():
        whole = vae.decode(z.to(dtype)).sample
        vae.decoder.tile_size = 5
        vae.enable_tiling()
        assert_ulp(vae.decode(z.to(dtype)).sample, whole)


@pytest.mark.parametrize("family", tiny.LOCAL)
def test_the_halo_is_the_receptive_radius_and_not_more(family: str) -> None:
    """A latent at the halo's distance can reach a tile's pixels, one beyond cannot: measured by gradients."""
    network = tiny.decoder(family).decoder
    halo = network.halo()
    assert halo is not None
    with torch.no_grad():  # no kernel may hide a neighbour: all weights positive
        for parameter in network.parameters():
            parameter.abs_().clamp_(min=1e-2)
    z = torch.full((1, 4, 41, 1 + 2 * 2), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(z)[:, :, 20 * 8 : 21 * 8].double().sum(), z)
    reached = gradient.abs().sum((0, 1, 3)).nonzero().flatten() - 20
    assert reached.abs().max() <= halo
    assert reached.abs().max() >= halo - 1  # rounding up at each upsampling may cost one


def test_tiles_of_global_families_are_blended_and_say_so() -> None:
    for family in ("temporal", "efficientvit"):
        fast, z = tiny.decoder(family), tiny.latents(height=13, width=11)
        whole = fast.decode(z).sample
        fast.enable_tiling(6)
        with pytest.warns(UserWarning, match="sees the whole picture"):
            blended = fast.decode(z).sample
        assert blended.shape == whole.shape
        assert blended.isfinite().all()
        assert 0 < (blended - whole).abs().mean() < 0.2
        with warnings.catch_warnings():  # a picture of one tile is whole
            warnings.simplefilter("error")
            fast.enable_tiling(13)
            assert torch.equal(fast.decode(z).sample, whole)


def test_blending_leaves_a_constant_as_it_is() -> None:
    """The weights of overlapping tiles sum to one everywhere, borders included, and keep the network's dtype."""

    class Constant(BlockNetwork):
        def forward(self, z: Tensor, num_frames: int | None = None) -> Tensor:
            return z.mean(1, keepdim=True).repeat(1, 3, 1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)

        def halo(self) -> int | None:
            return None

    for dtype in (torch.float32, torch.bfloat16):
        z = torch.full((1, 4, 11, 7), 0.75, dtype=dtype)
        with pytest.warns(UserWarning, match="blended"):
            sample = decode_tiled(Constant([nn.Identity()]), z, None, 3)
        assert sample.dtype == dtype
        torch.testing.assert_close(sample, torch.full((1, 3, 88, 56), 0.75, dtype=dtype))


def test_slicing_and_tiling_together() -> None:
    fast, z = tiny.decoder(), tiny.latents(n=3, height=9, width=9)
    whole = fast.decode(z).sample
    fast.enable_slicing()
    fast.enable_tiling(4)
    windows = watch(fast.decoder.layers[0], axis=0)
    torch.testing.assert_close(fast.decode(z).sample, whole, rtol=0, atol=1e-6)
    assert {window[0] for window in windows} == {1}


@pytest.mark.parametrize("tile_size", [0, -3])
def test_a_tile_size_below_one_latent_is_refused(tile_size: int) -> None:
    with pytest.raises(ValueError, match=f"tile_size must be at least 1 latent, got {tile_size}"):
        tiny.decoder().enable_tiling(tile_size)


def watch(network: nn.Module, axis: int | None = None) -> list[tuple[int, ...]]:
    """The shapes of what `network` is called with from now on: (height, width), or the one axis."""
    shapes: list[tuple[int, ...]] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes.append(tuple(inputs[0].shape[2:]) if axis is None else (inputs[0].shape[axis],))

    network.register_forward_pre_hook(note)
    return shapes
