import os

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process, as in those that the tests start
    torch.set_num_threads(1)

settings.register_profile("default", max_examples=60, deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
