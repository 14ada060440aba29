"""How fast and how exact a CLIP is on each device of this machine, in each precision, and as exported files.

    python examples/clip/benchmark.py --model examples/clip/demo_model --image examples/clip/shapes.png \\
        --texts "a large red circle" "a small blue cross" --batch-sizes 1 4 16 64
    python examples/clip/benchmark.py --merge npu.json cuda.json --output both.json

Each configuration runs in a process of its own, synchronised before and after every call, and its speed stands beside
its accuracy against the CPU's float32. NPU and CUDA want different builds of torch: measure in both environments, and
merge.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.clip.benchmark_run import main

    main(Path(__file__).name, __doc__)
