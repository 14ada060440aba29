"""Fine-tunes Stable Diffusion 2.1 on your pictures, on an Ascend 910B, a GPU or the CPU, on one device or several.

    python examples/training/train_text_to_image.py --data my_pictures --model_path stable-diffusion-2-1-base
    python examples/training/train_text_to_image.py --data my_pictures --full --preset memory --resume
    python examples/launch.py --device_list 0,1 -- examples/training/train_text_to_image.py --data my_pictures
    python examples/sd2.1/run_sd.py --lora outputs/training/pytorch_lora_weights.safetensors --prompt "..."

A folder of pictures has metadata.jsonl, a line {"file_name": "a.png", "text": "a caption"} for each, or a .txt file
beside each picture. Pictures that cannot be read are listed in skipped.json and left out. An adapter (LoRA) is
trained, or with --full the whole UNet. Stop it at any time: with --resume the same command goes on from the last
checkpoint, to the weights of an uninterrupted training. accelerate launch and torchrun start it on several devices,
too.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.training.run import main

    main(__doc__, HERE)
