"""The factors are those of the published times, and the estimates go with them."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest

from emulator import EmulatorError, calibration, profile

TIMES = tomllib.loads((calibration.PUBLISHED / "times.toml").read_text(encoding="utf-8"))
WORK = tomllib.loads((calibration.PUBLISHED / "work.toml").read_text(encoding="utf-8"))


@pytest.fixture(params=profile.names())
def chip(request: pytest.FixtureRequest) -> dict[str, Any]:
    return profile.load(request.param)


def factor(row: dict[str, Any]) -> float:
    """Published over nominal time of a picture, from the two tables alone."""
    ms = {(part["chip"], part["model"], part["part"]): part["ms"] for part in WORK["parts"]}
    nominal = sum(count * ms[row["chip"], row["model"], part] for part, count in row["work"].items())
    return row["seconds"] * 1e3 / nominal


def rows_of(chip: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in TIMES["pictures"] if TIMES["chips"][row["chip"]]["profile"] == chip["soc"]]


def test_the_factor_is_that_of_the_tables(chip: dict[str, Any]) -> None:
    factors = [factor(row) for row in rows_of(chip) if "held_out" not in row]
    assert len(factors) == 4
    found = calibration.factor_of(chip)
    assert found.ratios == pytest.approx(factors)
    assert min(factors) > 1  # no card is faster than its nominal figures
    middle = math.prod(factors) ** (1 / 4)
    assert found.estimate(10.0) == pytest.approx((10 * middle, 10 * min(factors), 10 * max(factors)))


def test_a_picture_is_predicted_by_the_others(chip: dict[str, Any]) -> None:
    whole = calibration.factor_of(chip)
    for picture in calibration.published_pictures(chip["soc"]):
        others = [
            factor(row)
            for row in rows_of(chip)
            if "held_out" not in row and (row["model"], row["method"]) != (picture.model, picture.method)
        ]
        assert sorted(whole.without(picture).ratios) == pytest.approx(sorted(others))
        assert len(others) == (4 if picture.held_out else 3)


def test_an_estimate_is_near_each_published_time_that_it_does_not_know(chip: dict[str, Any]) -> None:
    """What emulator/README.md says of them: 10 %, and 30 % of software that is older."""
    whole = calibration.factor_of(chip)
    for picture in calibration.published_pictures(chip["soc"]):
        predicted = whole.without(picture).estimate(picture.nominal_seconds()).middle
        assert predicted == pytest.approx(picture.seconds, rel=0.3 if picture.held_out else 0.1), picture


def test_published_pictures_are_whole_and_have_sources(chip: dict[str, Any]) -> None:
    assert all(row["source"] for row in TIMES["chips"].values())
    for row in rows_of(chip):
        steps = sum(count for part, count in row["work"].items() if part.startswith("UNet"))
        assert steps == (20 if "held_out" in row else 50), row
        assert (row["work"]["text encoder"], row["work"]["VAE decoder"]) == (2, 1)


def test_the_work_was_recorded_with_the_figures_of_the_profiles(chip: dict[str, Any]) -> None:
    names = {chip["soc"], *(row["chip"] for row in rows_of(chip))}
    for name in names:
        calibration.check_recorded(name, chip)
    faster = {**chip, "memory": {**chip["memory"], "bandwidth": 2 * chip["memory"]["bandwidth"]}}
    with pytest.raises(EmulatorError, match="run python scripts/emulator/record_work.py"):
        calibration.check_recorded(chip["soc"], faster)


@pytest.mark.parametrize("model", ["sd2.1-base", "sd1.5"])
def test_a_part_takes_as_long_as_its_arithmetic_and_its_traffic(chip: dict[str, Any], model: str) -> None:
    """At least the longer of both, which is the roofline of the sum, and at most the two one after the other."""
    parts = [part for part in WORK["parts"] if (part["chip"], part["model"]) == (chip["soc"], model)]
    assert len(parts) == 10
    for part in parts:
        arithmetic = part["gflop"] / chip["tflops"]["float16"]
        traffic = part["mb"] * 1e9 / chip["memory"]["bandwidth"]
        assert 0.99 * max(arithmetic, traffic) < part["ms"] < 1.01 * (arithmetic + traffic), part


def test_both_chips_do_the_same_arithmetic() -> None:
    """Whose fused attention are different operators; 1 % is what is computed beside the networks."""
    gflop = {(part["chip"], part["model"], part["part"]): part["gflop"] for part in WORK["parts"]}
    for (chip, model, part), found in gflop.items():
        assert found == pytest.approx(gflop["Ascend310P3", model, part], rel=0.01), (chip, model, part)


def test_what_was_not_recorded() -> None:
    with pytest.raises(EmulatorError, match="no work is recorded of sdxl on Ascend310P3 for: UNet, 1 row; run python"):
        calibration.nominal_seconds("Ascend310P3", "sdxl", {"UNet, 1 row": 1})


def test_a_chip_without_published_times_is_not_calibrated() -> None:
    other = {**profile.load("Ascend310P3"), "soc": "Ascend1"}
    assert calibration.describe(0.5, other).startswith("500.00 ms at the nominal speed and bandwidth of Ascend1; not")


def test_the_estimate_is_called_one() -> None:
    chip = profile.load("Ascend310P3")
    found = calibration.factor_of(chip)
    text = calibration.describe(0.010, chip)
    assert f"; {found.estimate(10.0).text()} ms calibrated: an estimate, not a measurement: " in text
    assert "by 4 pictures whose times Ascend published for other software (Atlas 300I Duo, both chips)" in text
