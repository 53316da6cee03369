"""FastDecoder by itself: conventions, dtypes, slicing, copies, training helpers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from fast_latent_decoders import EfficientViTDecoder, FastDecoder, SubpixelDecoder
from tests.pipelines import tiny

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("family", tiny.FAMILIES)
class TestEveryFamily:
    def test_the_output_is_a_picture_of_eight_times_the_size(self, family: str) -> None:
        z = tiny.latents(n=2, height=5, width=7)
        sample = tiny.decoder(family).decode(z).sample
        assert sample.shape == (2, 3, 40, 56)
        assert sample.dtype == torch.float32

    def test_every_way_of_calling_gives_the_same_tensor(self, family: str) -> None:
        fast, z = tiny.decoder(family), tiny.latents()
        expected = fast.decode(z).sample
        assert isinstance(fast.decode(z), DecoderOutput)
        for other in (fast.decode(z, return_dict=False), fast(z, return_dict=False), fast(z, num_frames=1, return_dict=False)):
            assert isinstance(other, tuple)
            assert torch.equal(other[0], expected)
        assert torch.equal(fast.decode(z, generator=torch.Generator(), num_frames=1).sample, expected)

    def test_latents_are_scaled_inside(self, family: str) -> None:
        fast, z = tiny.decoder(family, space="sd"), tiny.latents("sd")
        assert torch.equal(fast.decode(z).sample, fast.decoder(z * 0.18215))

    @pytest.mark.parametrize("dtype", HALVES)
    def test_latents_of_any_dtype_are_cast_to_the_decoder_s(self, family: str, dtype: torch.dtype) -> None:
        fast, z = tiny.decoder(family), tiny.latents()
        assert fast.decode(z.to(dtype)).sample.dtype == torch.float32
        half = tiny.decoder(family).to(dtype)
        assert half.decode(z).sample.dtype == dtype
        difference = half.decode(z).sample.float() - fast.decode(z).sample
        assert difference.abs().max() < (0.02 if dtype == torch.float16 else 0.15)

    def test_float16_is_finite_whatever_comes_in(self, family: str) -> None:
        """The squash bounds the input: constants, infinities of float16 and noise a thousand times too large."""
        fast = tiny.decoder(family).to(torch.float16)
        hostile = [torch.full((1, 4, 6, 6), value) for value in (0.0, 65504.0, -65504.0, 1e30)]
        hostile += [tiny.latents(height=6, width=6) * 1000, tiny.latents(height=6, width=6).sign() * 65504]
        largest = [0.0]
        for module in fast.decoder.modules():
            module.register_forward_hook(lambda *args: largest.append(args[2].abs().max().item()))
        for z in hostile:
            assert fast.decode(z).sample.isfinite().all()
        assert max(largest) < 2**14

    def test_deepcopy_and_pickle_decode_the_same_bits(self, family: str) -> None:
        fast, z = tiny.decoder(family), tiny.latents()
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(copied) is type(fast)
            assert dict(copied.config) == dict(fast.config)
            assert torch.equal(copied.decode(z).sample, fast.decode(z).sample)
            assert next(copied.parameters()).data_ptr() != next(fast.parameters()).data_ptr()

    def test_gradient_checkpointing_gives_the_same_gradients(self, family: str) -> None:
        gradients = []
        for checkpointing in (False, True):
            fast = tiny.decoder(family).requires_grad_(True)
            if checkpointing:
                fast.enable_gradient_checkpointing()
                assert fast.is_gradient_checkpointing
            fast.decode(tiny.latents()).sample.square().mean().backward()
            gradients.append([parameter.grad for parameter in fast.parameters()])
        assert any(gradient.any() for gradient in gradients[0])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(checkpointed, plain)

    def test_layerwise_casting_stores_float8_and_computes_in_the_wider_type(self, family: str) -> None:
        fast, z = tiny.decoder(family), tiny.latents()
        expected = fast.decode(z).sample
        fast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        assert any(parameter.dtype == torch.float8_e4m3fn for parameter in fast.parameters())
        sample = fast.decode(z).sample
        assert sample.dtype == torch.bfloat16
        assert (sample.float() - expected).square().mean().sqrt() < 0.1

    def test_slicing_decodes_one_clip_at_a_time_to_the_same_picture(self, family: str) -> None:
        fast, z = tiny.decoder(family).double(), tiny.latents(n=4)  # a processor may round a batch otherwise than its parts
        batches: list[int] = []
        for num_frames, expected_batches in ((None, [1] * 4), (2, [2, 2])):
            fast.disable_slicing()
            expected = fast.decode(z, num_frames=num_frames).sample
            fast.enable_slicing()
            batches.clear()
            handle = fast.decoder.register_forward_hook(lambda *args: batches.append(len(args[2])))
            sample = fast.decode(z, num_frames=num_frames).sample
            handle.remove()
            assert batches == expected_batches
            torch.testing.assert_close(sample, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "temporal"])
def test_channels_last_gives_the_same_picture(family: str) -> None:
    """Not the temporal family: torch refuses this format for 3-dimensional convolutions, as in SVD's own VAE."""
    fast, z = tiny.decoder(family), tiny.latents()
    expected = fast.decode(z).sample
    fast.to(memory_format=torch.channels_last)
    torch.testing.assert_close(fast.decode(z).sample, expected, rtol=0, atol=2e-5)


def test_the_published_efficientvit_decodes() -> None:
    fast = EfficientViTDecoder(published=True).eval()
    with torch.no_grad():
        assert fast.decode(tiny.latents(height=2, width=2)).sample.shape == (1, 3, 16, 16)


def test_arguments_by_position_are_kept() -> None:
    fast = SubpixelDecoder((16, 8, 8), (1, 1, 1), 1)
    assert SubpixelDecoder.from_config(fast.config).config.widths == (16, 8, 8)
    assert fast.inside(tiny.kl()).network.layers[0].out_channels == 16


def test_num_frames_mixes_frames_only_in_temporal_families() -> None:
    z = tiny.latents("sd", n=3)
    assert torch.equal(tiny.decoder("tae", "sd").decode(z, num_frames=3).sample, tiny.decoder("tae", "sd").decode(z).sample)
    temporal = tiny.decoder("temporal", "sd")
    assert (temporal.decode(z, num_frames=3).sample - temporal.decode(z).sample).abs().max() > 0.01


def test_a_batch_that_is_not_whole_clips_is_refused() -> None:
    with pytest.raises(ValueError, match="whole clips"):
        tiny.decoder("temporal").decode(tiny.latents(n=3), num_frames=2)


@pytest.mark.parametrize("method", ["decode", "forward"])
def test_a_misspelt_keyword_is_a_type_error(method: str) -> None:
    with pytest.raises(TypeError, match="num_frame"):
        getattr(tiny.decoder(), method)(tiny.latents(), num_frame=3)


@pytest.mark.parametrize(
    "z",
    [torch.zeros(1, 16, 8, 8), torch.zeros(4, 8, 8), torch.zeros(1, 4, 1, 8, 8), torch.zeros(1, 4, 8, 8, dtype=torch.uint8)],
    ids=["channels", "no batch", "video", "integers"],
)
def test_latents_of_another_form_are_refused_with_both_shapes(z: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected floating-point latents \(N, 4, h, w\).*'sdxl'.*got.*\("):
        tiny.decoder().decode(z)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"force_upcast": True}, "force_upcast must be False"),
        ({"encoder": "tiny"}, "encoder must be one of embedded, external, none, got 'tiny'"),
        ({"block_out_channels": (64, 64)}, "must have 4 entries"),
        ({"latent_space": "sdxl", "scaling_factor": 0.18215}, "has scaling_factor 0.13025, got 0.18215"),
        ({"latent_space": "mine"}, "latent_channels must be given"),
        ({"latent_space": "mine", "latent_channels": 16}, "latent_channels and scaling_factor must be given"),
        ({"widths": (8, 8)}, "up to three widths and as many block counts"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SubpixelDecoder(**config)


def test_another_latent_space_has_its_own_channels_and_shift() -> None:
    config = {"latent_space": "mine", "latent_channels": 16, "scaling_factor": 0.5, "shift_factor": 0.1}
    fast = SubpixelDecoder(widths=(8, 8, 8), blocks=(1, 1, 1), convs=1, **config).eval()
    z = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        assert torch.equal(fast.decode(z).sample, fast.decoder((z - 0.1) * 0.5))


def test_pipelines_find_what_they_read_in_the_config() -> None:
    """CONTRACT 2.1: a factor of 8, the scaling factor, channels, no upcasting, no means."""
    for family in tiny.FAMILIES:
        config = tiny.decoder(family).config
        assert len(config.block_out_channels) == 4
        assert (config.scaling_factor, config.latent_channels, config.force_upcast) == (0.13025, 4, False)
        assert getattr(config, "latents_mean", None) is None
    assert FastDecoder.__module__ == SubpixelDecoder.__module__ == "fast_latent_decoders"


def test_a_new_family_is_found_by_its_class_name_and_keeps_its_own_module() -> None:
    class ForeignDecoder(SubpixelDecoder):
        pass

    try:
        assert FastDecoder.families["ForeignDecoder"] is ForeignDecoder
        assert ForeignDecoder.__module__ == __name__
    finally:
        del FastDecoder.families["ForeignDecoder"]
