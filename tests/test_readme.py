"""The pages: every python block runs, every relative link leads somewhere, and the front door stays short."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith((".", "runs")) for part in path.relative_to(ROOT).parts[:-1])
)
MANY_RANKS = {"README.md": "## Many ranks", "st_moe_pytorch/distributed/README.md": "# Experts on many ranks"}
"""Where the part of a page begins whose blocks run in tests/distributed."""


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks_of(page):
    """Python blocks for one process."""
    text = page.read_text(encoding="utf-8").partition(MANY_RANKS.get(name_of(page), "\0"))[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_python_blocks_run_in_order(page, capsys):
    blocks = blocks_of(page)
    if any("from transformers" in block for block in blocks) and not find_spec("transformers"):
        pytest.skip("needs the extra integrations")
    namespace = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_the_pages_are_those_that_are_meant():
    assert {name_of(page) for page in PAGES if blocks_of(page)} == {
        "README.md",
        "st_moe_pytorch/README.md",
        "st_moe_pytorch/tools/README.md",
    }
    for page in PAGES:
        assert set(re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)) <= {
            "python",
            "bash",
            "bibtex",
        }, page


def anchors_of(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        target = target / "README.md" if target.is_dir() else target
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_the_front_door_is_short_and_the_gate_runs_its_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 9 * 1024
    commands = re.findall(r"```bash\n(.*?)\n```", text)
    assert "pip install -e '.[test]' && pytest -n 2" in commands
    assert "-e '.[test]' && pytest -n 2" in (ROOT / ".ci" / "run").read_text()
