#!/usr/bin/env bash
# Builds diffusers with this repository's patches as a wheel and installs it. `bash apply_patch.sh --help` explains.
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "apply_patch.sh: '$python' is no Python 3.11 or newer, which diffusers needs;" \
        "activate a virtual environment or set PYTHON=/path/to/python" >&2
    exit 1
fi
python=$(command -v -- "$python")
[[ $python == /* ]] || python=$PWD/$python # its name is used from other folders, too; PATH may have relative ones
# -E: a diffusers on PYTHONPATH is not the installed one.
exec "$python" -E -B "$here/scripts/fork/apply_patch.py" "$@"
