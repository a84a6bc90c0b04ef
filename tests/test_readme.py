"""Every python block of the README runs, in order, in one namespace."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(capsys):
    single, _, distributed = README.read_text().partition("## Experts on many ranks")
    blocks = re.findall(r"```python\n(.*?)```", single, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["outputs"].shape == (4, 1024, 512)
    # the others run in tests/distributed
    assert set(re.findall(r"```(\w*)\n", single + distributed)) <= {"python", "bash", "bibtex", ""}


def test_the_gate_runs_the_commands_of_the_readme():
    text = README.read_text()
    commands = re.findall(r"```bash\n(.*?)\n```", text)
    assert "pip install -e '.[test]' && pytest" in commands
    script = (README.parent / ".ci" / "run").read_text()
    assert "-e '.[test]' && pytest" in script
