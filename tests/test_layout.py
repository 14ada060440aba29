"""Which package imports which, and what files are called: the layout, as far as a program can check it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.programs import ROOT

# What each package may import of the others; diffusers' fork imports none of them.
DOORS = {
    "emulator": set(),
    "ascend": set(),
    "processors": {"ascend"},
    "runners": {"ascend", "processors"},
    "examples": {"ascend", "processors", "runners"},
    "scripts": {"ascend", "processors", "runners", "emulator", "tests"},  # of which the tiny models
}
# Within a package, what a part may import of its siblings.
INNER_DOORS = {
    "ascend.acl": set(),
    "ascend.cgroup": set(),
    "ascend.chips": set(),
    "ascend.memory": {"ascend.cgroup"},
    "ascend.om": {"ascend.acl"},
    "ascend.pipelines": set(),
    "ascend.graphs": {"ascend.chips", "ascend.pipelines", "ascend.streaming"},
    "ascend.parallel": {"ascend.pipelines"},
    "ascend.planner": {"ascend.chips", "ascend.device", "ascend.memory", "ascend.sizes", "ascend.streaming"},
    "ascend.sizes": set(),
    "ascend.streaming": set(),
    "ascend.tiers": {"ascend.device"},
    "processors.kernels": set(),
    "processors.models": {"processors.kernels", "processors.merging"},
    "processors.merging": {"processors.kernels", "processors.models"},
    "processors.presets": {
        "processors.kernels",
        "processors.models",
        "processors.quantization",
        "processors.switches",
    },
}
FILES = {path: ast.parse(path.read_bytes()) for name in (*DOORS, "tests") for path in (ROOT / name).rglob("*.py")}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """What is imported when the file is, or when its functions are called; not what types alone need."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imports(node)


def ours(path: Path) -> set[str]:
    """The modules of this repository that a file imports."""
    names = {module_name(other) for other in FILES}
    found = set()
    for imported in imports(FILES[path]):
        while imported and imported not in names:
            imported = imported.rpartition(".")[0]
        found |= {imported} - {""}
    return found


@pytest.mark.parametrize("package", DOORS)
def test_packages_import_one_way(package: str) -> None:
    for path in FILES:
        if path.is_relative_to(ROOT / package):
            others = {name.partition(".")[0] for name in ours(path)} - {package}
            assert others <= DOORS[package], f"{path} imports {others}"


@pytest.mark.parametrize("part", INNER_DOORS)
def test_parts_of_a_package_import_one_way(part: str) -> None:
    package = part.partition(".")[0]
    for path in FILES:
        if f"{module_name(path)}.".startswith(f"{part}."):
            siblings = {".".join(name.split(".")[:2]) for name in ours(path) if name.startswith(f"{package}.")}
            assert siblings - {part} <= INNER_DOORS[part], f"{path} imports {siblings}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): ours(path) for path in FILES if not path.is_relative_to(ROOT / "tests")}
    # `from package import name` runs the package, and what is meant is the module that the name is from.
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}
    try:
        list(TopologicalSorter({name: found - packages for name, found in graph.items()}).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {error.args[1]}")


def test_only_programs_change_where_python_looks_for_modules() -> None:
    changing = {path for path, tree in FILES.items() if "sys.path" in ast.unparse(tree).replace("'sys.path'", "")}
    programs = {path for path, tree in FILES.items() if "__name__ == '__main__'" in ast.unparse(tree)}
    assert not {path for path in changing - programs if path.name != Path(__file__).name}
    assert not {path for path in changing if "tests" in path.parts and path.name != Path(__file__).name}


def test_files_called_tests_are_tests() -> None:
    called = {path for path in ROOT.glob("*/**/test_*") if not {".venv", "outputs"} & set(path.parts)}
    assert {path.relative_to(ROOT).parts[0] for path in called if "__pycache__" not in path.parts} <= {"tests"}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and part != "__main__" for part in name.split("."))


def test_private_helpers_are_not_tested_by_name() -> None:
    for path, tree in FILES.items():
        if path.is_relative_to(ROOT / "tests"):
            private = {name for name in imports(tree) if name.split(".")[0] in DOORS and is_private(name)}
            assert not private, f"{path} imports {private}"
