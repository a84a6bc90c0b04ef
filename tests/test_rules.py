"""House rules: what imports what, how large things may be, where torch's private names are, what tests have to vary."""

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest
import torch
from planted_faults import FAULTS, ROOT

import st_moe_pytorch
import st_moe_pytorch.distributed
from st_moe_pytorch.tools import (
    audit,
    balance,
    count,
    draws,
    export,
    finetune,
    pictures,
    plan,
    replay,
    swap,
    trace,
    upcycle,
    watch,
)

PACKAGE = ROOT / "st_moe_pytorch"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")) if path.name != "test_rules.py")

# imports only point up this list
ORDER = [
    *("compat", "checks", "topk", "losses", "layouts", "routing"),
    *("gate", "gating", "expert_choice", "grouped.cpu", "grouped.side_by_side", "grouped.linear", "grouped", "layers"),
    *(
        "distributed.compat",
        "distributed.placement",
        "distributed.collectives",
        "distributed.agreement",
        "distributed.strategies",
        "distributed.exchange",
        "distributed.shardable",
    ),
    *("distributed.sharding", "distributed.check", "distributed.compatibility", "distributed"),
    *("experts", "moe"),
    *(
        "tools.compat",
        "tools.upcycle",
        "tools.draws",
        "tools.watch",
        "tools.balance",
        "tools.replay",
        "tools.find",
        "tools.swap",
    ),
    *(
        "tools.plan",
        "tools.audit",
        "tools.trace",
        "tools.pictures",
        "tools.finetune",
        "tools.count",
        "tools.export",
        "tools",
    ),
    "st_moe_pytorch",
]

MOST_CODE = {"st_moe_pytorch": 1500, "grouped": 300, "distributed": 900, "tools": 1400}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def test_imports_point_up_the_list():
    modules = [name_of(path) for path in FILES if path != PACKAGE / "__init__.py"]
    assert sorted(modules) == sorted(ORDER)
    for path in FILES:
        mine = ORDER.index(name_of(path)) if name_of(path) in ORDER else len(ORDER)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("st_moe_pytorch"):
                theirs = node.module.removeprefix("st_moe_pytorch").removeprefix(".")
                for alias in node.names:
                    submodule = f"{theirs}.{alias.name}".removeprefix(".")
                    name = submodule if submodule in ORDER else theirs
                    assert ORDER.index(name) < mine, f"{path.name} imports {name}, which stands below it"
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: relative import"
            assert not (isinstance(node, ast.ImportFrom) and node.module == "__future__"), f"{path.name}: __future__"


def lines_of_code(path: Path) -> int:
    """Lines with code on them: not blank, and neither comments nor docstrings, which may be as long as readers need."""
    source = path.read_text()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in skipped]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_sizes():
    totals = dict.fromkeys(MOST_CODE, 0)
    for path in FILES:
        totals[path.parent.name] += lines_of_code(path)
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (
                    node.end_lineno
                    - node.lineno
                    + 1
                    - (len(inspect.cleandoc(ast.get_docstring(node) or "").splitlines()))
                    <= 60
                ), node.name
    for room, total in totals.items():
        assert total <= MOST_CODE[room], f"{room}: {total} lines of code"


def test_private_names_of_others_are_in_one_file():
    """But for those of named tuples, which are public."""
    for path in FILES:
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and re.match(r"_[a-z]", node.attr)
                and node.attr not in ("_replace", "_asdict", "_fields")
            ):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                assert owner in ("self", "cls"), f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_every_function_of_compat_has_a_test():
    tests = (ROOT / "tests" / "test_compat.py").read_text()
    for path in PACKAGE.rglob("compat.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert f"compat.{node.name}(" in tests or f"compat.{node.name}\n" in tests, node.name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_stand_once(fault):
    assert (PACKAGE / fault.file).read_text().count(fault.right) == 1
    assert (ROOT / "tests" / fault.test.partition("::")[0]).exists()


def public_functions():
    """All that users call: constructors and methods of public classes, and functions."""
    modules = [st_moe_pytorch, st_moe_pytorch.distributed]
    found = {f"{name}": getattr(module, name) for module in modules for name in module.__all__}
    for module in (audit, balance, count, draws, export, finetune, pictures, plan, replay, swap, trace, upcycle, watch):
        found |= {
            name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        }
    for name, value in found.items():
        if inspect.isclass(value):
            methods = {key: getattr(value, key) for key in vars(value) if not key.startswith("_") or key == "__init__"}
            yield from ((f"{name}.{key}", method) for key, method in methods.items() if inspect.isroutine(method))
        elif inspect.isfunction(value) and not name.startswith("_"):
            yield name, value


def test_every_parameter_with_a_default_is_varied_by_a_test():
    unvaried = []
    for name, function in public_functions():
        for parameter in inspect.signature(function).parameters.values():
            is_named = re.search(rf"\b{parameter.name}=|[\"']{parameter.name}[\"']: ", TESTS)
            if parameter.default is not inspect.Parameter.empty and not is_named:
                unvaried.append(f"{name}: {parameter.name}")
    assert not unvaried


def test_torch_is_what_the_project_says():
    (least,) = re.findall(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= tuple(map(int, least.split(".")))
