"""Sets of switches by one name, for a pipeline or a model, and what came of each of them."""

from processors.presets.enable import disable, enable
from processors.presets.table import PRESETS, Outcome, Report

__all__ = ["PRESETS", "Outcome", "Report", "disable", "enable"]
