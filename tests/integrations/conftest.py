import pytest

for package in ("transformers", "peft", "accelerate", "tensorboard"):
    pytest.importorskip(package)
