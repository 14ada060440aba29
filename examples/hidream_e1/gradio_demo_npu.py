"""A page for the browser that edits pictures with HiDream-E1 and draws with Stable Diffusion 2.1.

    python examples/hidream_e1/gradio_demo_npu.py
    python examples/hidream_e1/gradio_demo_npu.py --e1_1_path HiDream-E1-1 --llama_path Llama-3.1-8B-Instruct \\
        --refiner_path HiDream-I1-Full/transformer --sd_path stable-diffusion-2-1-base --FA

Without arguments it takes the demo models. It listens on this machine alone unless --host says otherwise, needs no
network, and keeps nothing once it ends.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.web.run import main

    main(__doc__, HERE)
