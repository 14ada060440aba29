"""Lines of the libraries below that say nothing a user could act on, or that the runners say better."""

import functools
import logging

# Logger, and a part of its message.
HIDDEN = (
    # diffusers imports the name that transformers keeps for those who have torchvision, which nothing here needs.
    ("transformers.utils.import_utils", "requires torchvision (not installed); falling back to"),
    # Both are of a prompt that is cut, of which `warn_of_long_prompts` says how long it is; no index is wrong.
    ("transformers.tokenization_utils_base", "Token indices sequence length is longer than"),
    (
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "The following part of your input was truncated",
    ),
)


def hide_known_messages() -> None:
    """Drop the lines of `HIDDEN` and no others. To be called before diffusers is imported, which causes the first."""
    for name, part in HIDDEN:
        logging.getLogger(name).addFilter(functools.partial(_lacks, part))


def _lacks(part: str, record: logging.LogRecord) -> bool:
    return part not in record.getMessage()
