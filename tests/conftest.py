"""What every test shares: no network, one thread (tiny tensors only wait for a second one, and pytest -n 2 has it), quiet libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what a test starts

import diffusers
import pytest
import torch
import transformers

from fast_latent_decoders import SubpixelDecoder


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_small() -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny decoder of random weights, for the command line."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("decoder")
    SubpixelDecoder(widths=(16, 8, 8), blocks=(1, 1, 1), convs=1).save_pretrained(folder)
    return str(folder)
