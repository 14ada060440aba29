"""How much longer than nominally pictures took on cards, by the times that Ascend published, and estimates by that.

For each picture of published/times.toml, published/work.toml has what its parts take at the chip's nominal speed and
bandwidth (the roofline of report.py). The published time over their sum is a factor; a chip's is the geometric mean of
its pictures', and the error bar is from the smallest to the largest. Nothing else is fitted. The factor holds all that
a roofline leaves out (launches, the host, the link, kernels short of the nominal speed), of other software than ours.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from emulator import EmulatorError

PUBLISHED = Path(__file__).parent / "published"
RECORDER = "python scripts/emulator/record_work.py"


class Estimate(NamedTuple):
    """Seconds: by the geometric mean, the smallest and the largest of the published pictures' factors."""

    middle: float
    low: float
    high: float

    def text(self, unit: float = 1.0, digits: int = 2) -> str:
        middle, low, high = (f"{seconds / unit:,.{digits}f}" for seconds in self)
        return f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class Picture:
    """A picture whose time Ascend published.

    Attributes:
        chip: a name of `chips()`.
        model, method: which network, and how its steps were computed.
        seconds: the published time.
        work: how often the chip runs each part.
        held_out: why nothing is calibrated by it; empty where something is.
    """

    chip: str
    model: str
    method: str
    seconds: float
    work: Mapping[str, int]
    held_out: str = ""

    def nominal_seconds(self) -> float:
        return nominal_seconds(self.chip, self.model, self.work)

    def factor(self) -> float:
        return self.seconds / self.nominal_seconds()


@dataclass(frozen=True)
class Factor:
    """Published over nominal time, of a chip's published pictures."""

    pictures: tuple[Picture, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(picture.factor() for picture in self.pictures)

    @property
    def middle(self) -> float:
        return statistics.geometric_mean(self.ratios)

    def estimate(self, nominal_seconds: float) -> Estimate:
        return Estimate(*(nominal_seconds * ratio for ratio in (self.middle, min(self.ratios), max(self.ratios))))

    def without(self, picture: Picture) -> Factor:
        return Factor(tuple(other for other in self.pictures if other != picture))

    def text(self) -> str:
        return f"{self.middle:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"

    def label(self) -> str:
        """What an estimate by this factor is, in words."""
        cards = ", ".join(sorted({chips()[picture.chip]["card"] for picture in self.pictures}))
        return (
            f"an estimate, not a measurement: nominal time x {self.text()}, by {len(self.pictures)} pictures whose "
            f"times Ascend published for other software ({cards})"
        )


def factor_of(chip: dict[str, Any]) -> Factor:
    """The factor of the chip of this profile.

    Raises:
        EmulatorError: there is no published time for it, or the work was recorded with other figures.
    """
    pictures = tuple(picture for picture in published_pictures(chip["soc"]) if not picture.held_out)
    if not pictures:
        raise EmulatorError(f"there is no published time for {chip['soc']}")
    for name in sorted({picture.chip for picture in pictures}):
        check_recorded(name, chip)
    return Factor(pictures)


def check_recorded(name: str, chip: dict[str, Any]) -> None:
    """Raises EmulatorError where the work of `name`, a chip of the profile `chip`, was recorded with other figures."""
    recorded, now = _read("work.toml")["figures"].get(name), figures(name, chip)
    if recorded != now:
        raise EmulatorError(f"the work on {name} was recorded with {recorded}, not with {now}: run {RECORDER}")


def describe(nominal_seconds: float, chip: dict[str, Any]) -> str:
    """A nominal time and the estimate of it for people, or why there is none."""
    nominal = f"{nominal_seconds * 1e3:,.2f} ms at the nominal speed and bandwidth of {chip['soc']}"
    try:
        factor = factor_of(chip)
    except EmulatorError as error:
        return f"{nominal}; not calibrated: {error}"
    return f"{nominal}; {factor.estimate(nominal_seconds).text(1e-3)} ms calibrated: {factor.label()}"


def figures(name: str, chip: dict[str, Any]) -> dict[str, float]:
    """TFLOPS in float16 and bytes per second: those that times.toml has for the chip `name`, or the profile's."""
    own = chips().get(name, {})
    return {
        "float16": own.get("float16", chip["tflops"]["float16"]),
        "bandwidth": own.get("bandwidth", chip["memory"]["bandwidth"]),
    }


def chips() -> dict[str, dict[str, Any]]:
    """The chips of published/times.toml by name."""
    return _read("times.toml")["chips"]


def published_pictures(soc: str) -> list[Picture]:
    """Those of the chips that are counted with the profile `soc`, and those that are held out, too."""
    rows = [row for row in _read("times.toml")["pictures"] if chips()[row["chip"]]["profile"] == soc]
    return [Picture(**row) for row in rows]


def recorded_chips() -> list[str]:
    return sorted(_read("work.toml")["figures"])


def nominal_seconds(chip: str, model: str, work: Mapping[str, int]) -> float:
    """The time that the parts of `model` in `work`, each so often, take at the nominal speed and bandwidth of `chip`.

    Raises:
        EmulatorError: the work of this chip, model or part was not recorded.
    """
    recorded = {
        row["part"]: row["ms"] / 1e3
        for row in _read("work.toml")["parts"]
        if (row["chip"], row["model"]) == (chip, model)
    }
    missing = sorted(set(work) - set(recorded))
    if missing:
        raise EmulatorError(f"no work is recorded of {model} on {chip} for: {', '.join(missing)}; run {RECORDER}")
    return sum(count * recorded[part] for part, count in work.items())


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((PUBLISHED / name).read_text(encoding="utf-8"))
