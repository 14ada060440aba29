#!/usr/bin/env bash
# Stable Diffusion 2.1: sets up the environment when needed, then makes pictures.
# Usage: bash examples/sd2.1/run_sd.sh                    the demo: all accelerations on, compared with a plain run
#        bash examples/sd2.1/run_sd.sh --prompt "..."     any options of run_sd.py; --help lists them
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
if (($# == 0)); then
    set -- --FA --TOME --DC --dynamo --compare
fi
python=$(bash "$here/../../scripts/setup_env.sh")
exec "$python" "$here/run_sd.py" "$@"
