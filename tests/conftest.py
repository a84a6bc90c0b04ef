import pytest
import torch
from hypothesis import settings

settings.register_profile("default", max_examples=60, deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
