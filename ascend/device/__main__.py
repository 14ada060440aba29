"""Prints every device of this machine: chip, dtypes, memory, which one is preferred, and why others are not there.

    python -m ascend.device           a table
    python -m ascend.device --json    the same for programs, memory in bytes

A line of `memory` is what is free of what there is, whoever uses the rest; of the CPU it is the host's memory, within
the limit of its control group.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ascend.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    # torch must import even where torch_npu is installed and CANN is not: saying so is what this program is for.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from ascend.device.summary import device_summary

    summary = device_summary()
    print(json.dumps(summary, indent=2) if arguments.json else show(summary))


def show(summary: dict[str, Any]) -> str:
    """`device_summary()` as lines of text."""
    lines = [f"{name:8}{show_device(name, entry)}" for name, entry in summary["devices"].items()]
    lines += [f"{kind:8}none: {reason}" for kind, reason in summary["absent"].items()]
    lines.append(f"preferred: {summary['preferred'] or 'none'} ({summary['preferred_because']})")
    lines.append(", ".join(f"{package} {version}" for package, version in summary["versions"].items() if version))
    return "\n".join(lines)


def show_device(name: str, entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"does not answer: {entry['error']}"
    free, total = (entry["memory"][key] / 2**30 for key in ("free", "total"))
    memory = f"{free:.1f} of {total:.1f} GiB free" + (" (the host's memory)" if name == "cpu" else "")
    return f"{entry['name']:24}{', '.join(entry['dtypes']):32}{memory}"


if __name__ == "__main__":
    main()
