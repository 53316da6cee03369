"""torch.compile in every form that pipelines can use, as one whole graph (backend aot_eager: traced and lowered, no compiler)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fast_latent_decoders import swap_decoder
from tests.pipelines import tiny

OPTIONS: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", tiny.FAMILIES)
class TestWholeDecoder:
    def test_the_network_in_place(self, family: str) -> None:
        """`vae.decoder.compile(...)` keeps the tensors' names, unlike `vae.decoder = torch.compile(...)` (CONTRACT 7.2)."""
        fast, z = tiny.decoder(family), tiny.latents()
        expected, names = fast.decode(z).sample, list(fast.state_dict())
        fast.decoder.compile(**OPTIONS)
        torch.testing.assert_close(fast.decode(z).sample, expected, rtol=0, atol=2e-5)
        assert list(fast.state_dict()) == names

    def test_decode(self, family: str) -> None:
        """`vae.decode = torch.compile(vae.decode)`: scaling and casting included."""
        fast, z = tiny.decoder(family), tiny.latents()
        expected = fast.decode(z).sample
        fast.decode = torch.compile(fast.decode, **OPTIONS)
        torch.testing.assert_close(fast.decode(z, return_dict=False)[0], expected, rtol=0, atol=2e-5)

    def test_repeated_blocks(self, family: str) -> None:
        fast, z = tiny.decoder(family), tiny.latents()
        expected = fast.decode(z).sample
        fast.compile_repeated_blocks(**OPTIONS)
        torch.testing.assert_close(fast.decode(z).sample, expected, rtol=0, atol=2e-5)

    def test_forward(self, family: str) -> None:
        """`torch.compile(vae)` compiles `forward` only; pipelines then run `decode` as it was (CONTRACT 7.1)."""
        fast, z = tiny.decoder(family), tiny.latents()
        expected = fast.decode(z).sample
        compiled = torch.compile(fast, **OPTIONS)
        torch.testing.assert_close(compiled(z, num_frames=1).sample, expected, rtol=0, atol=2e-5)
        assert torch.equal(compiled.decode(z).sample, expected)


@pytest.mark.parametrize("family", ["subpixel", "temporal"])
def test_the_socket_and_the_vae_around_it(family: str) -> None:
    vae, z = tiny.kl(), tiny.latents()
    vae.decoder = tiny.decoder(family).inside(vae)
    with torch.no_grad():
        expected = vae.decode(z).sample
        vae.decoder.compile(**OPTIONS)
        torch.testing.assert_close(vae.decode(z).sample, expected, rtol=0, atol=2e-5)
        torch._dynamo.reset()
        vae.decoder = tiny.decoder(family).inside(vae)
        vae.decode = torch.compile(vae.decode, **OPTIONS)
        torch.testing.assert_close(vae.decode(z).sample, expected, rtol=0, atol=2e-5)


def test_temporal_frames_in_one_graph() -> None:
    fast, z = tiny.decoder("temporal", "sd"), tiny.latents("sd", n=4)
    expected = fast.decode(z, num_frames=2).sample
    fast.decoder.compile(**OPTIONS)
    torch.testing.assert_close(fast.decode(z, num_frames=2).sample, expected, rtol=0, atol=2e-5)


def test_exact_tiles_in_one_graph() -> None:
    fast, z = tiny.decoder(), tiny.latents(height=9, width=7)
    expected = fast.decode(z).sample
    fast.enable_tiling(4)
    fast.decode = torch.compile(fast.decode, **OPTIONS)
    torch.testing.assert_close(fast.decode(z).sample, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("way", ["whole", "swapped"])
def test_in_a_pipeline(way: str) -> None:
    """The decoder compiled, and used by the pipeline: the graph is counted."""
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe = tiny.sdxl()
    if way == "whole":
        pipe.vae = tiny.decoder()
    else:
        swap_decoder(pipe, tiny.decoder())
    expected = tiny.run(pipe)
    pipe.vae.decoder.compile(backend=counting, fullgraph=True)
    np.testing.assert_allclose(tiny.run(pipe), expected, rtol=0, atol=2e-5)
    assert len(graphs) == 1
