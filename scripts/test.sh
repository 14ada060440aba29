#!/usr/bin/env bash
# Sets up the environment, then checks format, lint and types and runs the tests, also on emulated NPUs.
# Usage: bash scripts/test.sh [--slow] [pytest's arguments], or bash scripts/test.sh --asynchronous
#   --slow           only the cases that take minutes
#   --asynchronous   only the tests on emulated NPUs, with streams and launches on threads of their own, as on a card
set -euo pipefail

if [[ ${1:-} == --help ]]; then
    sed -n '2,/^set/ { /^#/ s/^# //p }' "$0"
    exit
fi
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
python=$(bash scripts/setup_env.sh --dev)
export HF_HUB_OFFLINE=1 # no test may depend on the network
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # nor on CANN, where torch_npu is installed
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the models are too small to share among threads

if [[ ${1:-} == --slow ]]; then
    shift
    exec "$python" -m pytest -m slow "$@"
fi

test_on_chips() { # with options of the emulator: both chips at once, as each uses one core
    local chips=(Ascend310P3 Ascend910B3) soc index failed=0
    "$python" -m emulator build
    logs=$(mktemp -d)
    processes=()
    trap 'kill "${processes[@]}" 2>/dev/null || true; rm -rf "$logs"' EXIT # Ctrl-C does not reach them
    for soc in "${chips[@]}"; do
        "$python" -m emulator run --soc "$soc" --devices 2 "$@" -- "$python" -m pytest tests/on_npu >"$logs/$soc" 2>&1 &
        processes+=($!)
    done
    for index in "${!chips[@]}"; do
        wait "${processes[$index]}" || failed=$?
        cat "$logs/${chips[$index]}"
    done
    return "$failed"
}

if [[ ${1:-} == --asynchronous ]]; then
    export TASK_QUEUE_ENABLE=1
    test_on_chips --asynchronous
    exit
fi
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
if (($#)); then
    exec "$python" -m pytest "$@"
fi
nice "$python" -m emulator build >/dev/null 2>&1 & # in what the tests leave of the cores
builder=$!
trap 'kill "$builder" 2>/dev/null || true' EXIT
# Each process takes one half of the list, and at its end what the other one has not come to; fixtures of a file are
# then rarely made twice.
"$python" -m pytest --numprocesses 2 --dist worksteal
wait "$builder" || true # test_on_chips says what failed
test_on_chips # the same on emulated chips, with the genuine torch_npu
