"""CLIP, and parts of Stable Diffusion, as ONNX files and offline models (.om) of Ascend NPUs.

    python examples/clip/convert_to_om.py clip --model examples/clip/demo_model --output-dir clip_om
    python examples/clip/convert_to_om.py clip --model examples/clip/demo_model --output-dir clip_onnx --onnx-only
    python examples/clip/convert_to_om.py onnx --model tower.onnx --output tower.om --soc-version Ascend310P3 \\
        --input-shape "pixel_values:-1,3,224,224" --dynamic-dims "1;2;4;8"

A CLIP becomes two files, one for pictures and one for texts, so that their numbers are free of each other. Each ONNX
file is compared with its model before CANN's atc is called. `pytorch_npu_inference.py --backend om --model clip_om`
runs them. What fails leaves atc's log, the conversion before it, and an exit code.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.offline.run import main

    main(Path(__file__).name, __doc__)
