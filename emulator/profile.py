"""Chip profiles: data files that say what a chip has, and the environment that tells it to the C++ runtime."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any

from emulator import EmulatorError

PROFILES = Path(__file__).parent / "profiles"
CANN_VERSION = "8.5.0"  # the release that the runtime reports; torch_npu enables features by it
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def names() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load(soc: str) -> dict[str, Any]:
    if soc not in names():
        raise EmulatorError(f"there is no profile for the chip {soc!r}; there are: {', '.join(names())}")
    return tomllib.loads((PROFILES / f"{soc}.toml").read_text(encoding="utf-8"))


def parse_size(text: str) -> int:
    """'24GiB', '512M' or plain bytes.

    Raises:
        ValueError: `text` is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 24GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def rule_lines(profile: dict[str, Any]) -> list[str]:
    """What emulator/src/ops/rules.cpp reads: a rule a line, of operator, parameter, check, its value and the error."""
    lines = [f"*\t\tdtype\t{dtype}\t-" for dtype in profile["dtypes"]["supported"]]
    for rule in profile["rules"]:
        for operator in rule["operators"]:
            for parameter in rule.get("parameters", [""]):
                lines.append("\t".join([operator, parameter, rule["check"], str(rule.get("value", "")), rule["text"]]))
    return lines


def write_rules(profile: dict[str, Any], directory: Path) -> Path:
    """Writes the rules to a file of `directory` that is named after their content, and returns its path."""
    text = "\n".join(rule_lines(profile)) + "\n"
    path = directory / f"rules-{profile['soc']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.tsv"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return path


def environment(profile: dict[str, Any], devices: int, memory: int | None, rules: Path) -> dict[str, str]:
    """The variables that emulator/src/runtime/chip.cpp and ops/rules.cpp read."""
    values = {
        "SOC": profile["soc"],
        "VERSION": CANN_VERSION,
        "DEVICES": devices,
        "MEMORY": memory or profile["memory"]["bytes"],
        "CUBE_CORES": profile["cores"]["cube"],
        "VECTOR_CORES": profile["cores"]["vector"],
        "L2": profile["cores"]["l2_bytes"],
        "INF_NAN": int(profile["numerics"]["inf_nan"]),
        "PEER_ACCESS": int(profile["links"]["peer_access"]),
        "RULES": rules,
    }
    return {f"CANN_EMULATOR_{name}": str(value) for name, value in values.items()}
