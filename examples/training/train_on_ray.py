"""The training of train_text_to_image.py under Ray Train, on a cluster or on this machine.

    python examples/training/train_on_ray.py --data my_pictures --workers 2
    python examples/training/train_on_ray.py --data /shared/pictures --output_dir /shared/out --address auto

Takes the same options and trains to the same weights; each worker is a rank with a device of its own. On several
machines --data, --model_path, --cache_dir and --output_dir are on a disk that all of them see.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.training.on_ray import main

    main(__doc__, HERE)
