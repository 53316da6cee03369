"""TAE and TAE-Temporal: counts, and equality with diffusers' modules."""

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_3d_blocks import MidBlockTemporalDecoder

from fast_latent_decoders.networks.tae import TAENetwork
from fast_latent_decoders.networks.temporal import TAETemporalNetwork, TemporalMidBlock, load_framewise

from .small import build, largest_difference, parameters, perturb


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
