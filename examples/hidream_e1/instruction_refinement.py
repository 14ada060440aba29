"""Puts an instruction into the words that HiDream-E1-Full was trained on, by a language model that sees the picture.

    export OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none
    python examples/hidream_e1/instruction_refinement.py --model Qwen2.5-VL-7B-Instruct \\
        --src_image photo.jpg --src_instruction "make it winter"

Any endpoint that speaks OpenAI's chat completions will do. Prints the prompt; in programs, use
runners.hidream.refine_instruction.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.hidream.refine_instruction import main

    main(__doc__)
