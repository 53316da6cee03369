"""What every test shares: no network, one thread (tiny tensors only wait for a second one), quiet libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_small() -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
