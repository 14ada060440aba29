"""Edits pictures as instructions say, with HiDream-E1.1, on an Ascend NPU, a GPU or the CPU.

    python examples/hidream_e1/inference_e1_1_npu.py
    python examples/hidream_e1/inference_e1_1_npu.py --image photo.jpg --instruction "make the sky red" \\
        --target_description "a lighthouse under a red sky" \\
        --model_path HiDream-E1-1 --refiner_path HiDream-I1-Full/transformer --llama_path Llama-3.1-8B-Instruct

Without arguments it edits the demo's picture by the demo model, which knows coloured shapes in four corners. Each
result is a .png in --output_dir with its settings inside and, when it is whole, beside it as .json. The same command
once more makes what is missing.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.hidream.arguments import E1_1
    from runners.hidream.run import main

    main(Path(__file__).name, __doc__, E1_1, HERE)
