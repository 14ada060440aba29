"""Accelerators that are not there: modules that answer as torch.cuda and torch_npu do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.programs import environment

# A machine with two 310P3 and a GPU, which torch_npu itself would refuse: the order among them is then seen.
ACCELERATORS = '''
import types
import torch

MIB = 2**20
emptied = []

def answers(name, count, module):
    """Odd totals that nobody would guess; others use all but a third of the memory."""
    module.is_available = lambda: True
    module.device_count = lambda: count
    module.get_device_name = lambda device: name
    module.is_bf16_supported = lambda **_: False
    module.mem_get_info = lambda device: (7 * (device.index + 1) * MIB, 21 * (device.index + 1) * MIB)
    module.memory_allocated = lambda device: 2 * MIB
    module.memory_reserved = lambda device: 3 * MIB
    module.max_memory_allocated = lambda device: 4 * MIB
    module.empty_cache = lambda: emptied.append(name)

npu = types.ModuleType("torch.npu")
answers("Ascend310P3", 2, npu)
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
answers("GPU", 1, torch.cuda)
'''


@pytest.fixture
def run_with_accelerators(tmp_path: Path) -> Callable[..., Any]:
    """Runs code in a process that has two NPUs and a GPU, and gives what it puts into `result`."""
    (tmp_path / "torch_npu.py").write_text(ACCELERATORS)

    def run(code: str, **changes: str) -> Any:
        variables = environment(TORCH_DEVICE_BACKEND_AUTOLOAD="0", **changes)
        variables["PYTHONPATH"] = f"{tmp_path}:{variables['PYTHONPATH']}"
        program = f"import json, torch_npu, torch\n{code}\nprint(json.dumps(result))"
        done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
