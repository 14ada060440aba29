"""The program that a first user of a card runs finds nothing wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.programs import ROOT

PROGRAM = ROOT / "scripts/npu_setup/check_npu_setup.py"
KERNELS = {"Ascend310P": "npu_prompt_flash_attention", "Ascend910B": "npu_fused_infer_attention_score"}


@pytest.mark.timeout(1200)  # the true shapes, of which the CPU computes the references too
def test_every_operator_a_graph_and_a_collective_agree_with_the_cpu(
    npu: torch.device, chip: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.json"
    command = [sys.executable, PROGRAM, "--device", "npu", "--json", "--bundle", bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, [check for check in checks.values() if check["status"] != "ok"]
    assert chip in checks["device"]["found"]
    kernel = next(name for series, name in KERNELS.items() if chip.startswith(series))
    attentions = [check["found"] for name, check in checks.items() if "attention" in name]
    assert len(attentions) == 4 and all(found.startswith(kernel) for found in attentions)
    assert "s to compile" in checks["graph"]["found"]
    devices = min(2, torch.npu.device_count())
    assert checks["collective"]["found"].startswith(f"all_gather between {devices} devices")
    written = json.loads(bundle.read_text())["results"]
    statuses = dict.fromkeys(checks, "ok")
    if torch.version.cuda:
        statuses["torch"] = "warning"  # a CUDA build beside torch_npu
    assert [(check["name"], check["status"]) for check in written] == list(statuses.items())
