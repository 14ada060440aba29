"""Pictures from text, or from text and a picture, with Stable Diffusion 2.1, on an Ascend NPU, a GPU or the CPU.

    python examples/sd2.1/run_sd.py --prompt "a large red circle in the centre, white background" --FA --TOME --DC
    python examples/sd2.1/run_sd.py --prompt "a blue circle" --image photo.png --mask mask.png --lora style.safetensors

Writes each picture to --output_dir as it is drawn, and at the end, also when it is interrupted, report.json and, with
--compare, comparison.png.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.stable_diffusion.run import main

    main(__doc__, HERE)
