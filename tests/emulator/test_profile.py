"""The chip profiles are complete, and their rules speak of operators and parameters that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from emulator import EmulatorError, profile

SOURCES = Path(profile.__file__).parent / "src/ops"
KERNEL_FAMILIES = {"PRODUCT": ("self", "mat2")}
HCCL_PARAMETERS = {"dataType", "op", "op of dataType"}
DECLARATION = re.compile(r"(ACLNN|FUNCTION|BOTH|MOVE|PRODUCT)\((\w+),\s*(?:\(([^{]*?)\)\s*[{,]|)")


def parameters_of_operators() -> dict[str, set[str]]:
    """The operators of emulator/src/ops with their parameters, expanding the macros that hold parts of a list."""
    found: dict[str, set[str]] = {}
    for path in SOURCES.glob("*.cpp"):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        macros = dict(re.findall(r"#define (\w+_TENSORS|\w+_NUMBERS|\w+_RESULTS)\s+(.*)", text))
        for kind, name, parameters in DECLARATION.findall(text + expanded_families(text)):
            for macro, content in macros.items():
                parameters = parameters.replace(macro, content)
            found[name] = set(re.findall(r"(\w+)\s*(?:,|$)", parameters.strip()))
            found[name] |= {"out"} if kind == "FUNCTION" else set()
    for name in ("Mm", "Matmul", "MatmulWeightNz", "BatchMatMul"):
        found[name] = set(KERNEL_FAMILIES["PRODUCT"])
    found["Foreach"] = set()  # all operators of graphs on lists of tensors
    found |= parameters_on_lists()
    hccl = (SOURCES.parent / "hccl/hccl.cpp").read_text(encoding="utf-8")
    for name in re.findall(r"CANN_API HcclResult (\w+)\(", hccl):
        found[name] = HCCL_PARAMETERS
    return found


def expanded_families(text: str) -> str:
    """What a file's macros that declare whole operators, such as a loss and its gradient, stand for."""
    expanded = []
    for macro, names, body in re.findall(r"#define (\w+)\((\w+(?:, \w+)*)\)\s+((?:ACLNN|FUNCTION)\(.*)", text):
        for values in re.findall(rf"^{macro}\(([^()]*)\)", text, re.MULTILINE):
            declarations = body
            for name, value in zip(names.split(", "), values.split(", "), strict=True):
                declarations = re.sub(rf"\b{name}\b", value, declarations)
            expanded.append(declarations.replace("##", ""))
    return "\n".join(expanded)


def parameters_on_lists() -> dict[str, set[str]]:
    """The eager operators on lists of tensors, of the tables in foreach.h and the lines of foreach.cpp."""
    declarations = (SOURCES / "foreach.cpp").read_text(encoding="utf-8").replace("\\\n", " ")
    found = {
        f"Foreach{name}": set(re.findall(r"(\w+)(?:,|$)", parameters)) | {"out"}
        for name, parameters in re.findall(r"^FOREACH\((\w+), \((.*?)\)", declarations, re.MULTILINE)
    }
    tables = (SOURCES / "foreach.h").read_text(encoding="utf-8").replace("\\\n", " ")
    for table, rows in re.findall(r"#define FOREACH_OF_(\w+)\(X\)(.*)", tables):
        row_macro = re.search(rf"FOREACH_OF_{table}\((\w+)\)", declarations)
        assert row_macro is not None, table
        (body,) = re.findall(rf"#define {row_macro[1]}\(NAME, \.\.\.\)(.*)", declarations)
        for suffix, parameters in re.findall(r"FOREACH\(NAME(?:##)?(\w*), \((.*?)\)", body):
            for name in re.findall(r"X\((\w+),", rows):
                found[f"Foreach{name}{suffix}"] = set(re.findall(r"(\w+)(?:,|$)", parameters)) | {"out"}
    return found


@pytest.fixture(params=profile.names())
def chip(request: pytest.FixtureRequest) -> dict[str, Any]:
    return profile.load(request.param)


def test_there_are_both_chips() -> None:
    assert profile.names() == ["Ascend310P3", "Ascend910B3"]


def test_a_profile_has_what_the_runtime_and_the_report_read(chip: dict[str, Any]) -> None:
    assert chip["memory"]["bytes"] > 2**30
    assert chip["memory"]["bandwidth"] > 1e9
    assert chip["tflops"]["float16"] > 1
    assert ("bfloat16" in chip["dtypes"]["supported"]) == chip["numerics"]["inf_nan"]


def test_every_row_of_the_ai_cpu_has_a_source_and_names_what_exists(chip: dict[str, Any]) -> None:
    graphs = (SOURCES.parent / "graph").glob("*.cpp")
    names = set(re.findall(r"\bGE(?:_MOVES)?\((\w+)", "".join(path.read_text(encoding="utf-8") for path in graphs)))
    eager = set(re.findall(r"\b[A-Z]+\((\w+)", "".join(path.read_text() for path in SOURCES.glob("*.cpp"))))
    listed = [operator for row in chip["ai_cpu"] for operator in row["operators"]]
    assert len(listed) == len(set(listed))
    for row in chip["ai_cpu"]:
        assert row["source"].startswith(("ops-nn ", "ops-math ")), row
        assert set(row["ai_core"]) <= set(chip["dtypes"]["supported"])
        for operator in row["operators"]:
            assert operator in names | eager or operator.removeprefix("Inplace") in eager, operator


def test_every_rule_has_a_source_and_names_what_exists(chip: dict[str, Any]) -> None:
    operators = parameters_of_operators()
    for rule in chip["rules"]:
        assert rule["source"] and rule["text"], rule
        for operator in rule["operators"]:
            base = operator.removeprefix("Inplace")
            assert base in operators or operator in operators, operator
            known = operators.get(operator) or operators[base]
            assert set(rule.get("parameters", [])) <= known, (operator, rule["parameters"], known)


def test_rules_are_a_line_each(chip: dict[str, Any], tmp_path: Path) -> None:
    path = profile.write_rules(chip, tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.count("\t") == 4 for line in lines)
    assert profile.write_rules(chip, tmp_path) == path  # the same rules, the same file
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("text, size", [("24GiB", 24 * 2**30), ("512M", 2**29), ("1.5 k", 1536), ("1000", 1000)])
def test_sizes(text: str, size: int) -> None:
    assert profile.parse_size(text) == size


@pytest.mark.parametrize("text", ("", "24 apples", "-1G"))
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        profile.parse_size(text)


def test_an_unknown_chip() -> None:
    with pytest.raises(EmulatorError, match="no profile for the chip 'Ascend1'; there are: Ascend310P3, Ascend910B3"):
        profile.load("Ascend1")
