"""The parts that runners share: pictures, files, tables, schedulers, errors."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from examples.common.cli import UserError, one_line_errors
from examples.common.files import write_atomically, write_json
from examples.common.images import GridRow, save_png, side_by_side, similarity
from examples.common.overflow import overflow_warning
from examples.common.report import format_table
from examples.common.schedulers import SCHEDULERS, make_scheduler


def noise(seed: int, width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_text_in_a_png_survives_in_any_script(tmp_path: Path) -> None:
    save_png(noise(0), tmp_path / "a.png", {"prompt": "一个红色的圆 — größer", "seed": "3"})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"prompt": "一个红色的圆 — größer", "seed": "3"}
        assert np.array_equal(image, noise(0))


def test_psnr_is_what_its_definition_gives() -> None:
    first, second = noise(1), noise(2)
    error = np.mean((np.asarray(first, dtype=float) - np.asarray(second, dtype=float)) ** 2)
    assert similarity(first, second).psnr == pytest.approx(10 * math.log10(255**2 / error))
    assert abs(similarity(first, second).ssim) < 0.1  # unrelated pictures


def test_equal_pictures_have_no_finite_psnr() -> None:
    assert similarity(noise(1), noise(1)) == (same := similarity(noise(2), noise(2)))
    assert same.psnr is None and same.ssim == 1


def test_a_grid_holds_every_picture_whole_and_in_its_place() -> None:
    rows = [
        GridRow("first " * 20, [noise(1, 256, 128), noise(2, 256, 128)]),
        GridRow("b", [noise(3, 256, 128), noise(4, 256, 128)]),
    ]
    grid = np.asarray(side_by_side(["plain", "accelerated"], rows))
    found = {}
    for row, entry in enumerate(rows):
        for column, image in enumerate(entry.images):
            left = 8 + column * 264
            tops = [
                top
                for top in range(grid.shape[0] - 127)
                if np.array_equal(grid[top : top + 128, left : left + 256], image)
            ]
            assert len(tops) == 1
            found[row, column] = tops[0]
    assert found[0, 0] == found[0, 1] < found[1, 0] == found[1, 1]
    assert found[1, 0] >= found[0, 0] + 128


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"old")

    def disk_full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_json_that_other_languages_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"psnr": math.inf})
    write_json(tmp_path / "a.json", {"prompt": "größer"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"prompt": "größer"}


def test_a_table_lines_up() -> None:
    table = format_table(
        ["plain", "accelerated"], [("per image (s)", [1.25, 0.5], ".2f"), ("SSIM", [None, 0.98], ".3f")]
    )
    assert table.splitlines() == [
        "               plain  accelerated",
        "per image (s)   1.25         0.50",
        "SSIM               -        0.980",
    ]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_draws_with_the_models_own_betas(tiny_sd: StableDiffusionPipeline, name: str) -> None:
    scheduler = make_scheduler(name, like=tiny_sd.scheduler)
    assert scheduler.config.beta_end == tiny_sd.scheduler.config.beta_end
    tiny_sd.scheduler = scheduler
    generator = torch.Generator().manual_seed(0)
    latents = tiny_sd(
        "a", num_inference_steps=4, generator=generator, height=64, width=64, output_type="latent"
    ).images
    assert latents.isfinite().all() and latents.std() < 10


def test_a_black_picture_is_reported_and_a_dark_one_is_not() -> None:
    cpu, black = torch.device("cpu"), Image.new("RGB", (8, 8))
    dark = black.copy()
    dark.putpixel((3, 3), (0, 0, 1))
    assert "all black" in overflow_warning([dark, black], cpu)
    assert overflow_warning([dark], cpu) is None


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no\n  such thing"), 2, "error: no such thing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 1, "error: out of memory"),
        (MemoryError(), 1, "error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), 1, "error: No space left on device: a.png"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_errors_that_are_no_bugs_are_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == code
    [printed] = capsys.readouterr().err.splitlines()
    assert printed.startswith(line)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("x"), OSError("from a library")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), one_line_errors():
        raise error
