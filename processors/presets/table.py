"""Which switches a preset asks for, and the report of what came of them."""

from typing import Literal, NamedTuple

# In the order in which they are switched on: weights change before they are placed, and graphs see the result.
SWITCHES = (
    "fused_kernels",
    "token_merging",
    "cache_interval",
    "mixed_precision",
    "quantized_weights",
    "vae_slicing",
    "vae_tiling",
    "gradient_checkpointing",
    "streaming",
    "channels_last",
    "graphs",
)
_EXACT = {"fused_kernels", "mixed_precision"}
_SHORTCUTS = {"token_merging", "cache_interval"}
_SAVING = {"quantized_weights", "vae_slicing", "vae_tiling", "gradient_checkpointing", "streaming"}
PRESETS: dict[str, frozenset[str]] = {
    # Pictures differ from those without by more than rounding.
    "speed": frozenset(_EXACT | _SHORTCUTS | {"channels_last", "graphs"}),
    # Only by rounding.
    "balanced": frozenset(_EXACT | {"channels_last", "graphs", "vae_slicing"}),
    # The least memory of the device. Weights of 8 bits and tiles change pictures a little.
    "memory": frozenset(_EXACT | _SAVING),
    "full": frozenset(SWITCHES),
}
DEFAULT = "balanced"
VARIABLE = "ASCEND_PRESET"

MERGE_RATIO = 0.5
CACHE_INTERVAL = 3


class Outcome(NamedTuple):
    """What came of one switch, and what shows it or why."""

    status: Literal["applied", "unsupported", "not asked for"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class Report(dict[str, Outcome]):
    """Of each switch its outcome; as text a line for each."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:{width}}  {outcome}" for name, outcome in self.items())


def check_preset(name: str, origin: str = "preset") -> str:
    """`name`, which came from `origin`.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"{origin} '{name}' is not known: take one of {', '.join(PRESETS)}")
    return name
