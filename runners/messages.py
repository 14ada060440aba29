"""What is said in the terminal beside the runners' own lines: which of the libraries' are hidden, which shown."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Of the libraries: logger, and a part of a message that says nothing a user could act on, or that runners say better.
HIDDEN = (
    # diffusers imports the name that transformers keeps for those who have torchvision, which nothing here needs.
    ("transformers.utils.import_utils", "requires torchvision (not installed); falling back to"),
    # Both are of a prompt that is cut, of which `warn_of_long_prompts` says how long it is; no index is wrong.
    ("transformers.tokenization_utils_base", "Token indices sequence length is longer than"),
    (
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "The following part of your input was truncated",
    ),
    # Of an adapter for the UNet alone; one that fits nowhere is refused with the names of its tensors.
    ("diffusers.loaders.lora_base", "No LoRA keys associated to"),
    # Of no module at all, for a checkpoint that is one file.
    ("diffusers.models.modeling_utils", "should be kept in float32: []"),
)


def hide_known_messages() -> None:
    """Drop the lines of `HIDDEN` and no others. To be called before diffusers is imported, which causes the first."""
    for name, part in HIDDEN:
        logging.getLogger(name).addFilter(functools.partial(_lacks, part))


def _lacks(part: str, record: logging.LogRecord) -> bool:
    return part not in record.getMessage()


@contextmanager
def shown(name: str) -> Iterator[None]:
    """Print what the logger `name` and those below it say of their progress, on stderr."""
    logger, handler = logging.getLogger(name), logging.StreamHandler()
    level = logger.level
    handler.setFormatter(logging.Formatter("  %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
