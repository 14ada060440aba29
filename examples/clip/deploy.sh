#!/usr/bin/env bash
# A CLIP as checked and measured ONNX files and offline models (.om): sets up the environment when needed, then converts.
# Usage: bash examples/clip/deploy.sh              the demo CLIP, into ./deployed_models
#        bash examples/clip/deploy.sh --help       lists the options
# On a host with a card, source CANN's set_env.sh first; without atc there are ONNX files alone.
set -euo pipefail

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../..
python=$(bash "$root/scripts/setup_env.sh" --onnx)
exec "$python" "$root/scripts/demo_clip/deploy.py" "$@"
