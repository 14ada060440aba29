"""Stubs for the CANN functions that torch_npu links to and the emulator does not have.

The dynamic linker wants every one of them before torch_npu loads. A stub ends the process and names its function:
it never reports success, because a program would continue with wrong results.

Only functions that are *linked to* get a stub. torch_npu looks others up by name and handles their absence itself;
a stub there would make it believe that the feature exists.
"""

import ctypes
import subprocess
from collections.abc import Iterable
from pathlib import Path


def _symbols(library: Path, which: str) -> set[str]:
    """Names in a library's dynamic symbol table; versioned ones (libc's and libstdc++'s) are left out."""
    lines = subprocess.run(
        ["nm", "--dynamic", which, str(library)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    fields = [line.split() for line in lines]
    if which == "--undefined-only":  # 'w' marks a weak reference, which may stay unresolved
        return {names[-1] for names in fields if names[-2] == "U" and "@" not in names[-1]}
    return {names[-1].split("@")[0] for names in fields}


def _in_this_process(name: str) -> bool:
    """Python's own C interface and libc are here already."""
    return hasattr(ctypes.CDLL(None), name)


def required_symbols(torch_npu: Path, torch: Path) -> list[str]:
    """What CANN must give to the torch_npu wheel: undefined there, and defined neither by it nor by torch."""
    ours = sorted(torch_npu.rglob("*.so"))
    undefined = set().union(*(_symbols(library, "--undefined-only") for library in ours))
    known = set().union(*(_symbols(lib, "--defined-only") for lib in [*ours, *sorted(torch.glob("lib/*.so*"))]))
    return sorted(name for name in undefined - known if not name.startswith("Py") and not _in_this_process(name))


def defined_symbols(library: Path) -> set[str]:
    return _symbols(library, "--defined-only")


def stub_source(symbols: Iterable[str]) -> str:
    """C++ with one function per symbol; the assembler label lets it carry a mangled C++ name."""
    lines = ['extern "C" [[noreturn]] void cann_emulator_missing(const char* symbol);']
    for index, symbol in enumerate(symbols):
        lines.append(f'extern "C" __attribute__((visibility("default"))) void stub_{index}() __asm__("{symbol}");')
        lines.append(f'void stub_{index}() {{ cann_emulator_missing("{symbol}"); }}')
    return "\n".join(lines) + "\n"
