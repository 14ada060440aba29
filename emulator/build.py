"""Builds the emulated CANN libraries with g++, once for each content of sources, torch and torch_npu.

Objects are kept, so that a change compiles what includes it, and no more.

One library holds everything. The names that torch_npu links to and opens are thin libraries that need the real one:
the dynamic linker and dlsym both find its symbols through them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from emulator import EmulatorError, stubs, toolkit

SOURCES = Path(__file__).parent / "src"
PROGRAMS = SOURCES / "programs"  # a file for each, outside the libraries
REAL = "cann_emulator"
# DT_NEEDED of torch_npu, torchair, onnxruntime-cann and programs that use offline models, and what op_api_common.h and
# the function loaders open at run time.
THIN = (
    "acl_op_compiler",
    "acl_tdt_channel",
    "ascend_protobuf",
    "ascendcl",
    "fmk_onnx_parser",
    "fmk_parser",
    "ge_compiler",
    "ge_runner",
    "graph",
    "hccl",
    "opapi",
)
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-attribute-alias",
)
PROTOBUF = "protobuf==7.36.2"  # of torchair
ONNXRUNTIME_CANN = ("onnxruntime-cann==1.24.4", "numpy==1.26.4")
PRECOMPILED = "ATen/ATen.h"  # takes longer to read than any kernel to compile
# GCC takes a precompiled header before all others only, and never from within another header.
INCLUDE_PRECOMPILED = ("-include", PRECOMPILED, "-Werror=invalid-pch")
TORCH_LIBRARIES = ("torch_cpu", "c10")
INCLUDED = re.compile(r'^#include "(.+)"', re.MULTILINE)
KEPT_SECONDS = 14 * 24 * 3600  # an object that no build has used for so long


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cann_emulator"


def torch_dir() -> Path:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise EmulatorError("torch is not installed in this Python; install requirements.txt first")
    return Path(spec.origin).parent


def torch_npu_site() -> Path:
    """The directory of the unmodified torch_npu wheel, installed there when needed.

    It is a place of the emulator's own: in the normal environment `import torch` would load torch_npu, and fail
    wherever there is no CANN.
    """
    version = importlib.metadata.version("torch").split("+")[0]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    site = cache_dir() / f"torch_npu-{version}-{PROTOBUF.replace('==', '-')}-{python}"
    if site.is_dir():
        return site
    requirements = [f"torch_npu=={version}"]
    requirements += [*_missing("pyyaml==6.0.3", "yaml"), *_missing(PROTOBUF, "google.protobuf")]
    _install(site, requirements)
    return site


def onnxruntime_cann_site() -> Path:
    """The directory of the unmodified onnxruntime-cann wheel and of the NumPy that it is built for.

    For processes of their own: it has the name of onnxruntime, and does not import with NumPy 2.
    """
    wheels = "-".join(requirement.replace("==", "-") for requirement in ONNXRUNTIME_CANN)
    site = cache_dir() / f"{wheels}-cp{sys.version_info.major}{sys.version_info.minor}"
    if not site.is_dir():
        _install(site, ONNXRUNTIME_CANN)
    return site


def _install(site: Path, requirements: Sequence[str]) -> None:
    """Without dependencies: torch and numpy are here, and a second torch would hide them."""
    print(f"emulator: installing {' '.join(requirements)} into {site}", file=sys.stderr)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        target = Path(scratch) / "site"
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
        _run(*pip, "--target", target, *requirements)
        _rename(target, site)


def _missing(requirement: str, module: str) -> list[str]:
    try:
        return [] if find_spec(module) else [requirement]
    except ModuleNotFoundError:  # of the package that the module would be in
        return [requirement]


def _rename(source: Path, target: Path) -> None:
    """Another process may have been faster; its result is as good."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or shutil.which(compiler) is None:
        raise EmulatorError("no C++ compiler: install g++ 11 or newer (Debian: apt-get install g++), or set CXX")
    return compiler


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise EmulatorError(f"{' '.join(str(part) for part in command)} failed:\n{done.stderr.strip()}")


def _sources() -> list[Path]:
    sources = [path for path in SOURCES.rglob("*.cpp") if path.parent != PROGRAMS]
    return sorted(sources, key=lambda path: -path.stat().st_size)  # the longest compilations first


def _toolchain(site: Path) -> str:
    """What every object depends on beside its sources; of the wheels the version stands for the content."""
    compiler = subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout
    return f"{compiler}{torch_dir()} {importlib.metadata.version('torch')} {site}{FLAGS}"


def _digest(site: Path) -> str:
    """Changes with all that is compiled or linked."""
    digest = hashlib.sha256(f"{_toolchain(site)}{THIN}".encode())
    for path in sorted([*SOURCES.rglob("*.*"), Path(stubs.__file__), Path(toolkit.__file__), Path(__file__)]):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _includes(source: Path) -> set[Path]:
    """The source and the headers of ours that it includes, directly or through others."""
    found, waiting = {source}, [source]
    while waiting:
        for name in INCLUDED.findall(waiting.pop().read_text()):
            header = SOURCES / name
            if header.is_file() and header not in found:
                found.add(header)
                waiting.append(header)
    return found


def _headers(site: Path) -> tuple[Path, ...]:
    """Where the wheel keeps CANN's C headers; releases before 2.11 have them in the second place only."""
    include = site / "torch_npu/include"
    return include, include / "third_party/acl/inc"


def _options(site: Path, precompiled: Path) -> list[str]:
    torch = torch_dir() / "include"
    includes = [f"-I{path}" for path in (SOURCES, precompiled, *_headers(site))]
    includes += [f"-isystem{path}" for path in (torch, torch / "torch/csrc/api/include")]
    return [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={_torch_abi()}", *includes]


def _precompile(site: Path, objects: Path, digest: str) -> Path:
    """The directory of torch's header, compiled; built if it is not there yet."""
    target = objects / f"headers-{digest[:16]}"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=objects) as scratch:
            header = Path(scratch) / "result" / PRECOMPILED
            header.parent.mkdir(parents=True)
            header.write_text(f'#include_next "{PRECOMPILED}"\n')
            options = _options(site, Path(scratch) / "result")
            _run(_compiler(), *options, "-x", "c++-header", header, "-o", f"{header}.gch")
            _rename(Path(scratch) / "result", target)
    return target


def _compile_all(site: Path, jobs: int) -> list[Path]:
    """The object of each source, from the cache where neither it nor what it includes has changed."""
    objects = cache_dir() / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    toolchain = hashlib.sha256(_toolchain(site).encode())

    def compile_one(source: Path) -> Path:
        digest = toolchain.copy()
        contents = {path: path.read_bytes() for path in sorted(_includes(source))}
        for path, content in contents.items():
            digest.update(path.relative_to(SOURCES).as_posix().encode() + content)
        is_with_torch = any(b"#include <ATen/" in content for content in contents.values())
        target = objects / f"{source.parent.name}.{source.stem}-{digest.hexdigest()[:16]}.o"
        if target.exists():
            target.touch()
        else:
            with tempfile.TemporaryDirectory(dir=objects) as scratch:
                compiled = Path(scratch) / target.name
                _run(
                    _compiler(),
                    *options,
                    *(INCLUDE_PRECOMPILED if is_with_torch else ()),
                    "-c",
                    source,
                    "-o",
                    compiled,
                )
                compiled.replace(target)
        progress.update()
        return target

    sources = _sources()
    with tqdm(total=len(sources) + 1, desc="emulator: building", unit="file") as progress:
        options = _options(site, _precompile(site, objects, toolchain.hexdigest()))
        progress.update()
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compile_one, sources))


def _forget_old_objects() -> None:
    for path in (cache_dir() / "objects").glob("*.o"):
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


def _torch_abi() -> int:
    import torch

    return int(torch.compiled_with_cxx11_abi())


def _link(out: Path, objects: list[Path], site: Path) -> None:
    """Links the real library twice: the first shows what is missing, the second has stubs for it."""
    real = out / f"lib{REAL}.so"
    torch_libraries = torch_dir() / "lib"
    link: list[str | Path] = [_compiler(), "-shared", f"-Wl,-soname,{real.name}", "-o", real, *objects]
    libraries = [f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}", *(f"-l{name}" for name in TORCH_LIBRARIES)]
    _run(*link, *libraries)
    required = stubs.required_symbols(site / "torch_npu", torch_dir())
    missing = [name for name in required if name not in stubs.defined_symbols(real)]
    generated = out / "stubs.cpp"
    generated.write_text(stubs.stub_source(missing))
    _run(_compiler(), "-fPIC", "-w", "-c", generated, "-o", out / "stubs.o")
    _run(*link, out / "stubs.o", *libraries)
    for name in THIN:
        target = out / f"lib{name}.so"
        _run(
            *(_compiler(), "-shared", f"-Wl,-soname,{target.name}", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"),
            *(f"-L{out}", f"-l{REAL}", f"-Wl,-rpath-link,{torch_libraries}", "-o", target),
        )


def _link_programs(out: Path, libraries: Path) -> None:
    """The commands of the toolkit, which find the libraries from where they lie."""
    out.mkdir()
    link = [f"-L{libraries}", f"-l{REAL}", "-Wl,-rpath,$ORIGIN/../../lib", f"-Wl,-rpath-link,{torch_dir() / 'lib'}"]
    for source in sorted(PROGRAMS.glob("*.cpp")):
        _run(_compiler(), *FLAGS, source, *link, "-o", out / source.stem)


def build(jobs: int = os.cpu_count() or 1) -> Path:
    """The directory with the libraries and the toolkit tree; built if it is not there yet."""
    site = torch_npu_site()
    target = cache_dir() / _digest(site)
    if target.is_dir():
        return target
    # Built aside and renamed, so that an interrupted or concurrent build leaves no half library behind.
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        linked, result = Path(scratch) / "linked", Path(scratch) / "result"
        linked.mkdir()
        (result / "lib").mkdir(parents=True)
        _link(linked, _compile_all(site, jobs), site)
        for library in linked.glob("*.so"):
            library.rename(result / "lib" / library.name)
        toolkit.write(result / "toolkit")
        _link_programs(result / "toolkit" / "bin", result / "lib")
        _rename(result, target)
    _forget_old_objects()
    return target
