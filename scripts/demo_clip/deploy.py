"""A CLIP as checked and measured ONNX files and offline models (.om) for Ascend NPUs; deploy.sh calls it.

    bash examples/clip/deploy.sh
    bash examples/clip/deploy.sh --model openai/clip-vit-base-patch32 --output-dir clip_om --dynamic-batch

The environment is looked at, both towers are exported and, where CANN's atc is, converted; the files' answers are
compared with torch's in float32 by pictures of scenes; then all is measured. deploy_report.md and deploy_report.json
in the output folder say what came out. What fails ends it, with an exit code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from scripts.demo_clip.deployment import main

    main("deploy.sh", __doc__)
