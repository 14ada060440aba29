#!/usr/bin/env bash
# Sets up the environment, then checks format, lint and types and runs the tests, also on emulated NPUs.
# Usage: bash scripts/test.sh [--slow] [pytest's arguments]      (--slow: only the cases that take minutes)
set -euo pipefail

cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
python=$(bash scripts/setup_env.sh --dev)
export HF_HUB_OFFLINE=1 # no test may depend on the network
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # nor on CANN, where torch_npu is installed
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the models are too small to share among threads

if [[ ${1:-} == --slow ]]; then
    shift
    exec "$python" -m pytest -m slow "$@"
fi
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
"$python" -m pytest "$@"

if (($# == 0)); then # the same on emulated chips, with the genuine torch_npu: both at once, as each uses one core
    "$python" -m emulator build
    logs=$(mktemp -d)
    processes=()
    trap 'kill "${processes[@]}" 2>/dev/null || true; rm -rf "$logs"' EXIT # Ctrl-C does not reach them
    chips=(Ascend310P3 Ascend910B3)
    for soc in "${chips[@]}"; do
        "$python" -m emulator run --soc "$soc" --devices 2 -- "$python" -m pytest tests/on_npu >"$logs/$soc" 2>&1 &
        processes+=($!)
    done
    failed=0
    for index in "${!chips[@]}"; do
        wait "${processes[$index]}" || failed=$?
        cat "$logs/${chips[$index]}"
    done
    exit "$failed"
fi
