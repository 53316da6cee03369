"""EfficientViT: counts, and equality with diffusers' modules."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import Decoder as DCDecoder
from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock as DCBlock

from fast_latent_decoders.networks.efficientvit import EfficientViTBlock, EfficientViTNetwork, PublishedEfficientViTNetwork
from fast_latent_decoders.networks.subpixel import SubpixelNetwork

from .small import largest_difference, parameters, perturb


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
