"""Pictures of many prompts on many devices: Stable Diffusion 2.1 on Ray Data, with a worker for each device.

    python examples/sd2.1/generate_batch.py --prompts prompts.jsonl --output_dir outputs/batch --workers 2

--prompts is a .jsonl file with an object on each line, or a .parquet file with such columns:

    {"prompt": "a lighthouse at dawn"}
    {"prompt": "a red circle", "id": "circle-7", "seed": 7, "negative_prompt": "blue"}
    {"prompt": "a red circle", "lora": ["loras/ink.safetensors:0.8", "loras/night.safetensors"]}

A row may name LoRA adapters, by paths relative to the file's folder. A worker keeps those of earlier rows in memory;
with --dynamo a change of adapters compiles anew, so let rows of one adapter follow each other.

Each picture becomes output_dir/images/NAME.png with its settings inside and, when the picture is whole, NAME.json.
NAME is the id, without one a digest of all that decides what the picture looks like. The same command once more goes
on where the last run ended, however it ended: what is there is not drawn again. Failures are listed at the end.

The model counts by what is in its files, so that exchanged weights make new pictures. Run and workers read them whole
when they start: 5 GB take 5 s of one core, less on several, and longer where the disk is slower than 1 GB/s.

On a cluster this folder, the model and output_dir must be at the same path on every machine.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.stable_diffusion.batch import main

    main(__doc__, HERE)
