"""What a picture's steps run on each of the chips that share it, and what the program says of them."""

from __future__ import annotations

import pytest

from emulator import calibration, profile
from scripts.emulator.predict_picture import count_parts, main, methods

REST = {"text encoder": 2, "VAE decoder": 1}


def test_two_chips_run_a_branch_each_and_the_shallow_steps_of_a_forecast_alone() -> None:
    all_steps, deep_cache, fast = (methods(7.5)[name] for name in ("all steps", "--DC 3", "--fast balanced"))
    assert count_parts(all_steps, 50, chips=2) == {"UNet, 1 row": 50, "UNet cut at 0,0, 1 row": 0, **REST}
    assert count_parts(deep_cache, 50, chips=1) == {"UNet, 2 rows": 17, "UNet cut at 0,0, 2 rows": 33, **REST}
    one, two = count_parts(fast, 50, chips=1), count_parts(fast, 50, chips=2)
    assert one["UNet, 2 rows"] == two["UNet, 1 row"] == 14
    assert one["UNet cut at 0,0, 1 row"] == two["UNet cut at 0,0, 1 row"] > 0


def test_guidance_decides_how_many_steps_are_full() -> None:
    full = [count_parts(methods(scale)["--fast balanced"], 50, chips=2)["UNet, 1 row"] for scale in (4.0, 7.5)]
    assert full == [10, 14]


def test_the_table_has_the_estimate_of_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--guidance_scale", "4"])
    text = capsys.readouterr().out
    parts = count_parts(methods(4.0)["--fast balanced"], 50, chips=2)
    nominal = calibration.nominal_seconds("Ascend310P3", "sd2.1-base", parts)
    estimate = calibration.factor_of(profile.load("Ascend310P3")).estimate(nominal).text()
    assert f"| --fast balanced | 10 | {parts['UNet cut at 0,0, 1 row']} | {nominal:.3f} | {estimate} |" in text
    assert "UnetCache, 15 of 50 full | 0." in text and " | 1.39 | " in text
    assert "an estimate, not a measurement" in text


def test_the_card_that_was_published_has_its_profiles_factor(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--chip", "Ascend910B4", "--chips", "1", "--steps", "6"])
    text = capsys.readouterr().out
    assert "Atlas 800I A2" in text and "Duo" not in text
    assert "| --fast balanced | not with 6 steps |" in text


def test_no_guidance_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--guidance_scale", "1"])
    assert "1.0 is no guidance" in capsys.readouterr().err
