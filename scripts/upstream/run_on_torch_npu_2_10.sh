#!/usr/bin/env bash
# Runs tests/on_npu on both emulated chips with torch 2.10.0 and torch_npu 2.10.0, the newest pair for which Ascend
# publishes images for 310P.
# Usage: bash scripts/upstream/run_on_torch_npu_2_10.sh [pytest's arguments]
#
# It makes an environment of its own, .venv-2.10. PyPI's torch 2.10.0 brings 7 GB of CUDA libraries; this takes the
# build without: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/upstream/run_on_torch_npu_2_10.sh
set -euo pipefail

cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.."
venv=$PWD/.venv-2.10
python=$venv/bin/python
export HF_HUB_OFFLINE=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[[ -x $python ]] || "${PYTHON:-python3}" -m venv "$venv"
PYTHON=$python bash scripts/setup_env.sh --dev --torch 2.10.0

for soc in Ascend310P3 Ascend910B3; do
    "$python" -m emulator run --soc "$soc" --devices 2 -- "$python" -m pytest tests/on_npu "$@"
done
