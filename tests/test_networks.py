"""The decoder networks by themselves: shapes, counts, equality with diffusers' modules, and what training and export need."""

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_dc import Decoder as DCDecoder
from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock as DCBlock
from diffusers.models.unets.unet_3d_blocks import MidBlockTemporalDecoder
from torch.utils.checkpoint import checkpoint

from fast_latent_decoders.networks.blocks import BlockNetwork
from fast_latent_decoders.networks.efficientvit import EfficientViTBlock, EfficientViTNetwork, PublishedEfficientViTNetwork
from fast_latent_decoders.networks.subpixel import SubpixelNetwork
from fast_latent_decoders.networks.tae import TAENetwork
from fast_latent_decoders.networks.temporal import TAETemporalNetwork, TemporalMidBlock, load_framewise

SMALL = {
    "tae": lambda channels=4: TAENetwork(channels, 16, (1, 1, 1, 1)),
    "tae of four widths": lambda channels=4: TAENetwork(channels, (16, 12, 8, 4), (1, 1, 1, 1)),
    "tae bilinear": lambda channels=4: TAENetwork(channels, 16, (1, 1, 1, 1), "bilinear"),
    "temporal": lambda channels=4: TAETemporalNetwork(channels, 64, (1, 1, 1, 1)),
    "temporal latent": lambda channels=4: TAETemporalNetwork(channels, 64, (1, 1, 1, 1), mid_block="latent"),
    "efficientvit": lambda channels=4: EfficientViTNetwork(channels, (32, 16, 8), 2, (1, 1)),
    "efficientvit at 1/8": lambda channels=4: EfficientViTNetwork(channels, (32, 16, 8), 2, (1, 1, 1), 3, "tae"),
    "published efficientvit": PublishedEfficientViTNetwork,
    "subpixel": lambda channels=4: SubpixelNetwork(channels, (16, 16, 8), (1, 1, 1), 2),
    "subpixel by 4": lambda channels=4: SubpixelNetwork(channels, (16, 16), (1, 1), 2),
    "subpixel by 8": lambda channels=4: SubpixelNetwork(channels, (16,), (1,), 2),
}
small = pytest.mark.parametrize("name", SMALL)


def build(name: str, channels: int = 4) -> BlockNetwork:
    """A small network in evaluation mode that has left its initialisation: nothing is zero, so nothing hides."""
    return perturb(SMALL[name](channels)).eval()


def perturb(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel()  # 1 for biases and gains
            parameter.add_(0.5 / max(fan_in, 25) ** 0.5 * torch.randn_like(parameter))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.5 * torch.rand_like(buffer))
    return module


def parameters(build) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# What every network does


@small
@pytest.mark.parametrize(("channels", "shape"), [(4, (1, 3, 5)), (4, (2, 1, 1)), (16, (1, 4, 2))])
def test_eight_times_the_latents(name, channels, shape):
    n, h, w = shape
    z = torch.randn(n, channels, h, w)
    with torch.no_grad():
        assert build(name, channels)(z).shape == (n, 3, 8 * h, 8 * w)


@small
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_finite_on_hostile_latents(name, dtype):
    network = build(name).to(dtype)
    hostile = torch.cat([1e4 * torch.randn(1, 4, 4, 4), torch.full((1, 4, 4, 4), 6e4), torch.zeros(1, 4, 4, 4)])
    with torch.no_grad():
        pictures = network(hostile.to(dtype))
    assert pictures.dtype == dtype and pictures.isfinite().all()


@small
def test_memory_layout_changes_nothing(name):
    network, z = build(name), torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        expected = network(z)
        channels_last = network.to(memory_format=torch.channels_last)(z.contiguous(memory_format=torch.channels_last))
    assert largest_difference(channels_last, expected) < 1e-5


@small
def test_gradient_checkpointing_gives_the_same_gradients(name):
    network, z = build(name), torch.randn(2, 4, 4, 4)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(z, num_frames=2).square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    expected = gradients()
    network.gradient_checkpointing = True
    network._gradient_checkpointing_func = lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False)
    for gradient, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
    assert all(gradient.any() for gradient in expected)


@small
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    network, z = build(name), torch.randn(2, 4, 3, 4)
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)(z, num_frames=2)
        assert largest_difference(compiled, network(z, num_frames=2)) < 1e-5


@small
def test_gradients_under_autocast_point_the_same_way(name):
    # On one x86 processor a bfloat16 Conv3d had NaN gradients: finite is not to be taken for granted.
    network, z = build(name), torch.randn(2, 4, 4, 4)

    def gradient(autocast: bool) -> torch.Tensor:
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            pictures = network(z, num_frames=2)
        pictures.float().square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    assert torch.cosine_similarity(gradient(True), gradient(False), dim=0) > 0.99


@pytest.mark.parametrize(
    ("network", "halo"),
    [
        (lambda: TAENetwork(4, 8), 19),
        (lambda: TAENetwork(4, 8, (3, 2, 2, 1), "bilinear"), 18),
        (lambda: PublishedEfficientViTNetwork(4), 16),
        (lambda: TAETemporalNetwork(4, 32), None),
        (lambda: EfficientViTNetwork(4), None),
    ],
)
def test_halo(network, halo):
    with torch.device("meta"):
        assert network().halo() == halo


@pytest.mark.parametrize("name", ["tae", "tae bilinear", "published efficientvit", "subpixel", "subpixel by 4", "subpixel by 8"])
def test_nothing_reaches_past_the_halo(name):
    network = build(name)
    halo = network.halo()
    # A row of latents; the pixels of the one in the middle must not depend on those past the halo.
    z = torch.randn(1, 4, 1, 2 * halo + 5, requires_grad=True)
    middle = halo + 2
    network(z)[..., 8 * middle : 8 * middle + 8].abs().sum().backward()
    assert z.grad[..., : middle - halo].abs().max() == 0 and z.grad[..., middle + halo + 1 :].abs().max() == 0


# TAE


def test_tae_parameter_counts():
    assert parameters(lambda: TAENetwork(4, 64)) == 1_222_531
    assert parameters(lambda: TAENetwork(4, 96)) == 2_746_179
    assert parameters(lambda: TAENetwork(4, 128)) == 4_878_083
    assert parameters(lambda: TAENetwork(4, 192)) == 10_966_659
    assert parameters(lambda: TAENetwork(4, 192, (3, 2, 2, 1))) == 8_974_851


@pytest.mark.parametrize(("blocks", "upsampling"), [((3, 3, 3, 1), "nearest"), ((3, 2, 2, 1), "bilinear")])
def test_tae_is_autoencoder_tiny(blocks, upsampling):
    stock = AutoencoderTiny(decoder_block_out_channels=(16,) * 4, num_decoder_blocks=blocks, upsample_fn=upsampling)
    perturb(stock.decoder)
    network = TAENetwork(4, 16, blocks, upsampling)
    network.load_state_dict(stock.decoder.state_dict())
    assert list(network.state_dict()) == list(stock.decoder.state_dict())
    z = 3 * torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        assert largest_difference(network(z), stock.decoder(z)) < 1e-6


@pytest.mark.parametrize("wrong", [{"width": 0}, {"width": (8, 8, 8)}, {"width": (8, 8, 8, 0)}, {"blocks": (3, 3, 1)}, {"blocks": (3, 3, 3, -1)}, {"upsampling": "bicubic"}])
def test_tae_refuses(wrong):
    with pytest.raises(ValueError, match=r"expected .* got"):
        TAENetwork(**{"latent_channels": 4, "width": 8} | wrong)


# TAE-Temporal


def test_temporal_parameter_counts():
    assert parameters(lambda: TAETemporalNetwork(4, 192, (3, 2, 2, 1), "bilinear")) == 10_897_541
    assert parameters(lambda: TemporalMidBlock(192)) == 1_922_690
    assert parameters(lambda: TemporalMidBlock(192).before) == 887_041
    assert parameters(lambda: TemporalMidBlock(192).attention) == 148_608


def copy_mid_block(ours: TemporalMidBlock, theirs: MidBlockTemporalDecoder) -> None:
    attention = theirs.attentions[0]
    ours.attention.norm.load_state_dict(attention.group_norm.state_dict())
    ours.attention.out.load_state_dict(attention.to_out[0].state_dict())
    projections = (attention.to_q, attention.to_k, attention.to_v)
    ours.attention.qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
    ours.attention.qkv.bias.copy_(torch.cat([projection.bias for projection in projections]))
    for block, stock in zip((ours.before, ours.after), theirs.resnets, strict=True):
        block.mix.copy_(stock.time_mixer.mix_factor)
        for layers, residual in ((block.spatial, stock.spatial_res_block), (block.over_time, stock.temporal_res_block)):
            for index, name in enumerate(("norm1", "conv1", "norm2", "conv2")):
                ours_here = layers[(0, 2, 3, 5)[index]]
                ours_here.weight.copy_(getattr(residual, name).weight.view_as(ours_here.weight))
                ours_here.bias.copy_(getattr(residual, name).bias)


@torch.no_grad()
def test_mid_block_is_mid_block_temporal_decoder():
    theirs = MidBlockTemporalDecoder(64, 64, attention_head_dim=32, num_layers=2)
    perturb(theirs)
    theirs.resnets[0].time_mixer.mix_factor.fill_(1.3)
    ours = TemporalMidBlock(64)
    copy_mid_block(ours, theirs)
    x = torch.randn(2 * 5, 64, 6, 7)
    assert largest_difference(ours(x, 5), theirs(x, torch.zeros(2, 5))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mid_block", ["upsampled", "latent"])
@pytest.mark.parametrize("num_frames", [None, 1, 2, 8])
def test_a_new_temporal_network_is_its_framewise_tae(mid_block, num_frames):
    tae = perturb(TAENetwork(4, 32, (2, 1, 1, 1)))
    network = TAETemporalNetwork(4, 32, (2, 1, 1, 1), mid_block=mid_block)
    load_framewise(network, tae.state_dict())
    z = torch.randn(8, 4, 3, 4)
    assert largest_difference(network(z, num_frames), tae(z)) < 1e-6


def test_loading_a_framewise_tae_is_strict():
    network = TAETemporalNetwork(4, 32, (1, 1, 1, 1))
    tae = TAENetwork(4, 32, (1, 1, 1, 1)).state_dict()
    fewer = {name: tensor for name, tensor in tae.items() if name != "layers.4.weight"}
    for wrong in (fewer, tae | {"layers.99.weight": torch.zeros(1)}, network.state_dict(), {"encoder": torch.zeros(1)}):
        with pytest.raises(RuntimeError):
            load_framewise(network, wrong)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 8, 14, 25])
def test_clips_of_a_batch_are_decoded_alone(frames):
    network = build("temporal")
    first, second = torch.randn(2, frames, 4, 2, 3)
    both = network(torch.cat([first, second]), frames)
    assert largest_difference(both, torch.cat([network(first, frames), network(second, frames)])) < 1e-5


@torch.no_grad()
def test_frames_are_mixed_within_a_clip_only():
    network = build("temporal")
    z = torch.randn(4, 4, 2, 2)
    assert largest_difference(network(z), network(z, 1)) == 0
    assert largest_difference(network(z, 4), network(z)) > 1e-3


def test_temporal_refuses():
    with pytest.raises(ValueError, match=r"expected a batch of whole clips.* got 8 pictures and num_frames 5"):
        build("temporal")(torch.randn(8, 4, 2, 2), num_frames=5)
    with pytest.raises(ValueError, match=r"32, 64, 96.* got 48"):
        TAETemporalNetwork(4, 48)
    with pytest.raises(ValueError, match=r"mid block.* got 16"):
        TAETemporalNetwork(4, (32, 16, 32, 32))
    TAETemporalNetwork(4, (32, 16, 8, 8), mid_block="latent")
    with pytest.raises(ValueError, match="upsampled, latent; got 'middle'"):
        TAETemporalNetwork(4, 32, mid_block="middle")


# EfficientViT


def test_efficientvit_parameter_counts():
    assert parameters(lambda: PublishedEfficientViTNetwork(4)) == 6_223_500
    assert parameters(lambda: EfficientViTNetwork(4)) == 12_788_876


@torch.no_grad()
def test_published_shape_is_diffusers_dc_ae_decoder():
    theirs = DCDecoder(
        in_channels=3,
        latent_channels=4,
        block_out_channels=(128, 128, 128, 256, 256, 256),
        layers_per_block=(0, 5, 10, 0, 0, 0),
        qkv_multiscales=((),) * 6,
        norm_type="batch_norm",
        act_fn=("relu",) * 3 + ("silu",) * 3,
    )
    perturb(theirs).eval()
    # In order of use their modules with tensors are ours: from the latents to the picture.
    in_order = [
        theirs.conv_in,
        *(layer for stage in reversed(theirs.up_blocks) for layer in stage),
        theirs.norm_out,
        theirs.conv_out,
    ]
    tensors = [tensor for module in in_order for tensor in module.state_dict().values()]
    ours = PublishedEfficientViTNetwork(4).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), tensors, strict=True)))
    z = torch.randn(1, 4, 5, 6)
    assert largest_difference(ours(z), theirs(3 * torch.tanh(z / 3))) < 1e-5


@torch.no_grad()
def test_efficientvit_block_is_diffusers_dc_ae_block():
    theirs = perturb(DCBlock(64, attention_head_dim=32, qkv_multiscales=(5,), norm_type="rms_norm"))
    attention, glu = theirs.attn, theirs.conv_out
    ours = EfficientViTBlock(64)
    qkv = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    ours.attention.qkv.weight.copy_(qkv[:, :, None, None])
    ours.attention.aggregate[0].load_state_dict(attention.to_qkv_multiscale[0].proj_in.state_dict())
    ours.attention.aggregate[1].load_state_dict(attention.to_qkv_multiscale[0].proj_out.state_dict())
    ours.attention.out.weight.copy_(attention.to_out.weight[:, :, None, None])
    ours.attention.norm.load_state_dict(attention.norm_out.state_dict())
    for name, other in {"expand": "conv_inverted", "depthwise": "conv_depth", "narrow": "conv_point", "norm": "norm"}.items():
        getattr(ours.feed_forward, name).load_state_dict(getattr(glu, other).state_dict())
    for size in ((9, 7), (3, 3)):  # below 32 positions theirs is quadratic, the same in exact arithmetic
        x = torch.randn(2, 64, *size)
        assert largest_difference(ours(x), theirs(x)) < 1e-5


@torch.no_grad()
def test_attention_is_float32_under_autocast_and_in_half_types():
    block = perturb(EfficientViTBlock(32))
    x = 3 * torch.randn(1, 32, 96, 96)  # sums over 9,216 positions of products that fp16 cannot hold
    block.attention.qkv.weight.mul_(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert largest_difference(block.attention(x).float(), block.attention(x.bfloat16()).float()) < 0.1
    attended = block.attention.half()(x.half())
    assert attended.isfinite().all()
    assert largest_difference(attended.float(), block.attention.float()(x)) < 0.05


@torch.no_grad()
def test_a_new_efficientvit_block_is_the_identity():
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(EfficientViTBlock(32)(x), x)


@torch.no_grad()
def test_efficientvit_without_attention_is_a_subpixel():
    ours = EfficientViTNetwork(4, (32, 16, 8), 2, (2, 1, 1), 3, "tae")
    plain = SubpixelNetwork(4, (32, 16, 8), (2, 1, 1), 3, "tae")
    assert [type(layer).__name__ for layer in ours.layers[:7]] == ["Conv2d", "ReLU", *["TAEBlock"] * 2, *["EfficientViTBlock"] * 2, "SubpixelUp"]
    convolutional = [layer for layer in ours.layers if not isinstance(layer, EfficientViTBlock)]
    for mine, theirs in zip(convolutional, plain.layers, strict=True):
        theirs.load_state_dict(mine.state_dict())
    z = torch.randn(1, 4, 5, 6)
    assert torch.equal(ours(z), plain(z))


@pytest.mark.parametrize("widths", [(250, 128, 64), (256, 127, 64), (256, 128), (0, 128, 64)])
def test_illegal_widths_list_the_legal_ones(widths):
    with pytest.raises(ValueError, match=r"32, 64, 96, .*, 512; 1/4: 8, 16.*; 1/2: 8, 16, 24.* got widths \("):
        EfficientViTNetwork(4, widths)


def test_efficientvit_refuses():
    with pytest.raises(ValueError, match="got -1"):
        EfficientViTNetwork(4, attention_blocks=-1)
    with pytest.raises(ValueError, match=r"got 9 and \(1, 1, 1, 1\)"):
        EfficientViTNetwork(4, residual_blocks=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="one of residual, tae; got 'vit'"):
        EfficientViTNetwork(4, block="vit")
    with pytest.raises(ValueError, match=r"divide 256 .*16.* got 6"):
        PublishedEfficientViTNetwork(6)
