"""Edits pictures as instructions say, with HiDream-E1-Full, on an Ascend NPU, a GPU or the CPU.

    python examples/hidream_e1/inference_npu.py
    python examples/hidream_e1/inference_npu.py --image photo.jpg --instruction "make the sky red" \\
        --target_description "a lighthouse under a red sky" \\
        --model_path HiDream-E1-Full --refiner_path HiDream-I1-Full/transformer --llama_path Llama-3.1-8B-Instruct
    python examples/hidream_e1/inference_npu.py --image photo.jpg --instruction "make the sky red" \\
        --target_description "a lighthouse under a red sky" \\
        --model_path HiDream-I1-Full --edit_lora HiDream-E1-Full.safetensors --llama_path Llama-3.1-8B-Instruct

The last edits with the 0.26 GB of an adapter, and refines by the same transformer while that is off.

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
    from runners.hidream.arguments import E1_FULL
    from runners.hidream.run import main

    main(Path(__file__).name, __doc__, E1_FULL, HERE)
