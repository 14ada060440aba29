"""The device layer, on whatever devices this machine has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ascend.device import (
    VISIBLE_DEVICES,
    DeviceError,
    DeviceManager,
    best_dtype,
    get_accelerator_type,
    get_all_devices,
    get_chip,
    get_device_info,
    get_memory_info,
    is_npu_available,
    narrow_visible_devices,
    set_seed,
)

CPU = torch.device("cpu")


def run_python(code: str, python_path: Path | None = None, **environment: str) -> str:
    paths = [str(path) for path in (python_path, Path.cwd()) if path]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_devices_are_listed_best_first_and_end_with_the_cpu() -> None:
    kinds = [device.type for device in get_all_devices()]
    assert kinds == sorted(kinds, key=["npu", "cuda", "cpu"].index)
    assert kinds[-1] == "cpu"
    assert kinds[0] == get_accelerator_type()
    assert is_npu_available() == ("npu" in kinds)


def test_every_device_can_be_asked_for_by_name() -> None:
    for device in get_all_devices():
        manager = DeviceManager(str(device))
        assert manager.device == device
        assert torch.ones(2, device=manager.device, dtype=manager.dtype).sum().item() == 2
        manager.synchronize()
        manager.empty_cache()


LIBRARY_MISSING = "libascendcl.so: cannot open shared object file"
TWO_ACCELERATORS = "Two accelerators cannot be used at the same time"
HOME_MISSING = "ASCEND_HOME_PATH : /nowhere does not exist."


@pytest.mark.parametrize(
    ("failure", "reason", "says_what_to_source"),
    [
        ("ImportError", LIBRARY_MISSING, True),
        ("OSError", LIBRARY_MISSING, True),
        ("RuntimeError", TWO_ACCELERATORS, False),
        ("Exception", HOME_MISSING, False),
    ],
)
def test_a_torch_npu_that_does_not_load_is_named_only_when_an_npu_is_asked_for(
    tmp_path: Path, failure: str, reason: str, says_what_to_source: bool
) -> None:
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {failure}({reason + chr(10) + '[ERROR] ERR00007'!r})")
    code = """
from ascend.device import DeviceError, DeviceManager, is_npu_available
print(is_npu_available(), DeviceManager("cpu").device)
try:
    DeviceManager("npu:1")
except DeviceError as error:
    print(error)
"""
    first, second = run_python(code, tmp_path).splitlines()
    assert first == "False cpu"
    assert second.startswith(f"device 'npu:1' is not there: torch_npu does not load ({reason})")
    assert ("set_env.sh" in second) == says_what_to_source


@pytest.mark.parametrize("before", ["import diffusers", "from ascend import device"])
def test_the_reason_why_an_npu_is_absent_is_the_same_whatever_is_imported_first(tmp_path: Path, before: str) -> None:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(f"raise ImportError({LIBRARY_MISSING!r})")
    metadata = tmp_path / "torch_npu-2.13.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    code = f"""
{before}
from ascend.device import DeviceError, find_device, is_npu_available
try:
    find_device("npu")
except DeviceError as error:
    print(error)
"""
    said = run_python(code, tmp_path)
    assert said.startswith(f"device 'npu' is not there: torch_npu does not load ({LIBRARY_MISSING})"), said


@pytest.mark.parametrize("name", ["npu", "cuda", "cuda:99"])
def test_an_absent_device_is_one_clear_error(name: str) -> None:
    if name in {device.type for device in get_all_devices()}:
        pytest.skip(f"this machine has {name}")
    with pytest.raises(DeviceError, match=f"device '{name}' is not there: "):
        DeviceManager(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has cuda")
def test_what_hides_a_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(DeviceError, match="with CUDA_VISIBLE_DEVICES=7"):
        DeviceManager("cuda")


@pytest.mark.parametrize(
    ("before", "devices", "expected"),
    [
        (None, [0, 2], "0,2"),
        ("4,6,7", [0, 2], "4,7"),
        ("GPU-a,GPU-b", [1], "GPU-b"),
        ("", [0, 1], None),  # hides all, and that stays
    ],
)
def test_chosen_devices_count_within_those_that_were_visible(
    monkeypatch: pytest.MonkeyPatch, before: str | None, devices: list[int], expected: str | None
) -> None:
    for variable in VISIBLE_DEVICES.values():
        monkeypatch.delenv(variable, raising=False)
        if before is not None:
            monkeypatch.setenv(variable, before)
    assert narrow_visible_devices(devices) == (
        {} if expected is None else dict.fromkeys(VISIBLE_DEVICES.values(), expected)
    )


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ([1, 0], "devices 1,0: CANN takes each device once, in ascending order"),
        ([0, 0], "devices 0,0: CANN takes each device once"),
        (
            [0, 2],
            "devices 0,2: ASCEND_RT_VISIBLE_DEVICES=4,6 was set before, by a scheduler perhaps, and has no device 2",
        ),
    ],
)
def test_devices_that_cann_or_a_scheduler_refuses_are_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, devices: list[int], reason: str
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,6")
    with pytest.raises(DeviceError, match=reason):
        narrow_visible_devices(devices)


@pytest.mark.parametrize("name", ["", "tpu", "npu:", "cuda:-1", "cpu:x", "NPU"])
def test_an_unknown_device_is_one_clear_error(name: str) -> None:
    with pytest.raises(DeviceError, match="is unknown: use npu, cuda or cpu"):
        DeviceManager(name)


def test_the_environment_prefers_a_device_and_an_argument_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFERRED_DEVICE", "tpu")
    with pytest.raises(DeviceError, match="PREFERRED_DEVICE: device 'tpu' is unknown"):
        DeviceManager()
    assert DeviceManager("cpu").device == CPU
    monkeypatch.setenv("PREFERRED_DEVICE", "cpu")
    assert DeviceManager().device == CPU


def test_the_cpu_computes_in_float32_and_has_no_chip() -> None:
    assert best_dtype(CPU) == torch.float32
    assert get_chip(CPU) is None
    assert get_device_info(CPU)["total_memory"] > 0


def test_equal_seeds_give_equal_numbers() -> None:
    draws = []
    for seed in (7, 7, 8):
        set_seed(seed)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    generator = DeviceManager().create_generator(7)
    assert generator.device == CPU
    assert torch.equal(torch.rand(3, generator=generator), draws[0])


def test_memory_of_the_cpu_is_the_process_own() -> None:
    manager = DeviceManager("cpu")
    manager.reset_peak_memory()
    before = manager.memory_stats()
    block = torch.ones(64 * 2**20)
    after = get_memory_info(CPU)
    assert after["allocated"] - before["allocated"] > 0.9 * block.nbytes
    assert after["peak"] >= after["allocated"]
    assert after["total"] > after["free"] > 0


def test_safetensors_load_from_a_file_and_from_shards(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3) for name in "ab"}
    save_file({"a": tensors["a"]}, tmp_path / "one.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "two.safetensors")
    manager = DeviceManager("cpu")
    assert list(manager.load_safetensors(tmp_path / "one.safetensors")) == ["a"]
    with pytest.raises(ValueError, match="2 .safetensors files and 0 indices"):
        manager.load_safetensors(tmp_path)

    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = manager.load_safetensors(tmp_path)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)

    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks two.safetensors"):
        manager.load_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        manager.load_safetensors(tmp_path / "absent")


def test_freed_memory_is_kept_once_a_program_asks_for_it_until_the_cache_is_emptied() -> None:
    code = """
import resource, torch
from ascend.device import DeviceManager
from ascend.memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

manager = DeviceManager("cpu")
print(new_pages(), new_pages())
keep_freed_memory()
for _ in range(8):  # until what lies free is in one piece: memory that is aligned leaves splinters
    new_pages()
print(new_pages())
manager.empty_cache()
print(new_pages())
"""
    first, second, kept, emptied = map(int, run_python(code).split())
    # Fewer than the 65536 pages of the tensor where the kernel hands out large ones.
    assert min(first, second, emptied) > 100, "a library has changed malloc for the whole process"
    assert kept < 100
