#!/usr/bin/env bash
# Installs the requirements and the patched diffusers, and prints the interpreter that has them.
# Usage: bash scripts/setup_env.sh [--batch] [--onnx] [--serve] [--training] [--dev] [--torch VERSION]
#   --batch     Ray Data as well, for generate_batch.py
#   --onnx      the exporter and onnxruntime, for convert_to_om.py and deploy.sh of examples/clip
#   --serve     Ray Serve, for examples/clip/serve.py
#   --training  TensorBoard and Ray Train, for examples/training
#   --dev       all of these, and the tools of the tests and checks
#   --torch     2.10.0, for hosts whose CANN goes with torch_npu 2.10.0, or 2.13.0; it holds for later calls as well
#
# The environment is that of $PYTHON when it is set, else the active virtual environment, else .venv, made when needed.
# What is installed already is left alone; then no network is needed. All messages go to stderr.
set -euo pipefail

root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup_env.sh: $*" >&2; }
fail() {
    say "$@"
    exit 1
}
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_venv() {
    local base
    for base in python3 python3.13 python3.12 python3.11; do
        if is_new_enough "$base"; then
            say "creating $root/.venv with $(command -v "$base")"
            "$base" -m venv --clear "$root/.venv" >&2 ||
                fail "cannot create .venv: install Python's venv module (Debian: apt-get install python3-venv)"
            return
        fi
    done
    fail "there is no Python 3.11 or newer; install one and set PYTHON=/path/to/python"
}

choose_torch() { # requirements with the chosen torch, in a folder of the environment unless it is the pinned one
    local chosen=$prefix/.diffusers-npu.torch pinned file
    pinned=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$root/requirements.txt")
    if [[ -z $torch && -e $chosen ]]; then
        torch=$(<"$chosen")
    fi
    requirements=$root
    if [[ -z $torch || $torch == "$pinned" ]]; then
        rm -f -- "$chosen"
        return
    fi
    requirements=$prefix/.diffusers-npu.requirements
    mkdir -p -- "$requirements"
    for file in "$root"/requirements*.txt; do
        sed -E "s/^(torch|torch_npu)==[^ ]*/\\1==$torch/" "$file" >"$requirements/${file##*/}"
    done
    echo "$torch" >"$chosen"
}

install() { # a file of requirements, unless it was installed already as it is now
    local stamp=$prefix/.diffusers-npu.$1 wanted
    wanted=$({ "$python" -VV && cat -- "$requirements/requirements.txt" "$requirements/$1"; } | sha256sum)
    if [[ $(cat -- "$stamp" 2>/dev/null) != "$wanted" ]]; then
        say "installing $1 into $prefix"
        # pip compiles files one by one, which is half of its time.
        "$python" -m pip install --no-compile --requirement "$requirements/$1" >&2 ||
            fail "could not install $1; see pip's message above"
        "$python" -m compileall -qq -j 0 "$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" ||
            true # packages bring templates and tests that are no Python of this version
        echo "$wanted" >"$stamp" # last, so that an interrupted installation is done again
    fi
}

extras=()
torch=
while (($#)); do
    case $1 in
        --batch) extras+=(requirements-batch.txt) ;;
        --onnx) extras+=(requirements-onnx.txt) ;;
        --serve) extras+=(requirements-serve.txt) ;;
        --training) extras+=(requirements-training.txt) ;;
        --dev) extras+=(requirements-{batch,onnx,serve,training,dev}.txt) ;;
        --torch | --torch=*)
            [[ $1 == *=* || $# -gt 1 ]] || fail "--torch needs a version: 2.13.0 or 2.10.0"
            torch=${1#--torch=}
            [[ $1 == *=* ]] || { torch=$2 && shift; }
            [[ $torch == 2.13.0 || $torch == 2.10.0 ]] || fail "--torch $torch: only 2.13.0 and 2.10.0 are tested"
            ;;
        *) fail "unknown option '$1' (usage: bash scripts/setup_env.sh [--batch] [--onnx] [--serve] [--training] [--dev] [--torch VERSION])" ;;
    esac
    shift
done

exec 9>"$root/.setup.lock" # two set-ups at once, say of a run and of the tests, take turns
flock 9

if [[ -n ${PYTHON:-} ]]; then
    python=$(command -v -- "$PYTHON") || fail "PYTHON=$PYTHON: there is no such program"
elif [[ -n ${VIRTUAL_ENV:-} ]]; then
    python=$VIRTUAL_ENV/bin/python
else
    python=$root/.venv/bin/python
    "$python" -m pip --version >/dev/null 2>&1 || make_venv
fi
is_new_enough "$python" || fail "$python does not run or is older than Python 3.11"

prefix=$("$python" -c 'import sys; print(sys.prefix)')
choose_torch
install requirements.txt
if [[ -e /dev/davinci_manager ]]; then # the Ascend driver's device node
    install requirements-npu.txt
fi
PYTHON=$python bash "$root/apply_patch.sh" >&2
for extra in requirements-prompts.txt "${extras[@]}"; do # after diffusers: some ask for one, and this must be ours
    install "$extra"
done

echo "$python"
