from importlib.util import find_spec

# of the extra "integrations"
if not all(map(find_spec, ("transformers", "peft", "accelerate", "tensorboard"))):
    collect_ignore_glob = ["test_*.py"]
