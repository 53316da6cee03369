"""The self-test behind --dtype auto."""

import torch
from fast_latent_decoders.speed import fastest_dtype

from fast_latent_decoders import SubpixelDecoder


def test_the_choice_leaves_the_decoder_and_torch_as_they_were() -> None:
    decoder = SubpixelDecoder(widths=(16, 8, 8), blocks=(1, 1, 1), convs=1)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    threads = torch.get_num_threads()
    assert fastest_dtype(decoder, "cpu") in (torch.float32, torch.bfloat16)
    assert fastest_dtype(decoder, "cuda") == fastest_dtype(decoder, torch.device("mps")) == torch.float16
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
