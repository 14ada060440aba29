#!/usr/bin/env bash
# Turns patches/ into a git tree with one commit per patch, and such a tree into patches/. --help explains.
set -euo pipefail

exec "${PYTHON:-python3}" -E -B "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/edit_patches.py" "$@"
