"""Which text describes a picture best, by CLIP or SigLIP, on an Ascend NPU, a GPU or the CPU.

    python examples/clip/pytorch_npu_inference.py --model examples/clip/demo_model --image examples/clip/shapes.png \\
        --texts "a large red circle on the left and a small blue cross on the right, white background" \\
        "a small blue cross in the centre, white background"
    python examples/clip/pytorch_npu_inference.py --image photos --texts "a photo of a cat" "a photo of a dog" --json
    python examples/clip/pytorch_npu_inference.py --input rows.jsonl --output results.jsonl --fp16 --FA

Prints the probability of each text: among them all with CLIP, of each by itself with SigLIP. A picture that cannot be
read is one line on stderr, the others go on, and the exit code is 1.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.clip.run import main

    main(Path(__file__).name, __doc__)
