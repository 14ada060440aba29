"""The parts that runners share: pictures, files, tables, schedulers, errors."""

import argparse
import errno
import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image

from ascend.sizes import byte_size
from runners import fonts
from runners.cli import (
    Terminated,
    UserError,
    file_path,
    one_line_errors,
    read_prompts,
    text,
)
from runners.files import write_atomically, write_json
from runners.images import GridRow, save_png, side_by_side, similarity
from runners.messages import hide_known_messages
from runners.overflow import overflow_warning
from runners.report import Report, format_table
from runners.schedulers import SCHEDULERS, check_steps, make_scheduler


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


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_not_clipped_as_pixels_unless_the_model_says_so(name: str) -> None:
    assert not make_scheduler(name, like=PNDMScheduler()).config.clip_sample  # which knows no such thing
    assert make_scheduler(name, like=DDIMScheduler(clip_sample=True)).config.clip_sample


def test_pndm_begins_without_runge_kutta_unless_the_model_says_so() -> None:
    assert make_scheduler("pndm", like=DDIMScheduler()).config.skip_prk_steps
    assert make_scheduler("pndm", like=PNDMScheduler()).config.skip_prk_steps  # the class's default is not the model's
    assert not make_scheduler("pndm", like=PNDMScheduler(skip_prk_steps=False)).config.skip_prk_steps


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
        (Terminated(), 143, "error: terminated by SIGTERM"),
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


def test_sigterm_ends_with_a_line_and_the_exit_code_of_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, one_line_errors():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert end.value.code == 143
    assert capsys.readouterr().err == "error: terminated by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_prompts_are_split_at_newlines_and_at_nothing_else(tmp_path: Path) -> None:
    inside = "\u2028\u2029\x0b\x0c\x1c\x1d\x1e\x85"  # where str.splitlines splits too
    (tmp_path / "prompts.txt").write_text(f"a cat{inside}on a mat\r\n\n  b  \n", encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "prompts.txt") == [f"a cat{inside}on a mat", "b"]


def test_a_path_may_begin_with_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_path("~/model") == tmp_path / "model"
    assert file_path("a/~") == Path("a/~")
    with pytest.raises(argparse.ArgumentTypeError, match="no-such-user"):
        file_path("~no-such-user/model")


@pytest.mark.parametrize("argument_type", [text, file_path])
def test_bytes_that_are_no_text_are_named(argument_type: object) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="has the byte 0xe9 after 3 characters"):
        argument_type(os.fsdecode(b"caf\xe9"))
    assert str(argument_type("gr\u00f6\u00dfer")) == "gr\u00f6\u00dfer"


def test_sizes_in_bytes() -> None:
    assert byte_size("8GiB") == byte_size("8g") == byte_size("8192 M") == 8 * 2**30
    assert byte_size("1.5K") == 1536 and byte_size("12") == 12
    for wrong in ("", "8 apples", "-1G", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a size as 8GiB"):
            byte_size(wrong)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("ddim", 1200, "--steps 1200: the model was trained with 1000"),
        ("ddim", 1000, "cannot take that number .*; 999 would do"),  # steps_offset is 1
        ("pndm", 1000, "PNDMScheduler .* cannot take that number .*; 999 would do"),
        ("euler", 1001, "trained with 1000"),
        ("dpm++", 1000, "cannot take that number .*; 998 would do"),
        ("unipc", 1000, "cannot take that number .*; 998 would do"),
    ],
)
def test_steps_that_a_scheduler_cannot_take_are_found_before_a_picture(
    tiny_sd: StableDiffusionPipeline, name: str, steps: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_steps(make_scheduler(name, like=tiny_sd.scheduler), steps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_was_checked_draws_as_before(tiny_sd: StableDiffusionPipeline, name: str) -> None:
    def draw(checked: bool) -> torch.Tensor:
        tiny_sd.scheduler = make_scheduler(name, like=tiny_sd.scheduler)
        if checked:
            check_steps(tiny_sd.scheduler, 5)
        generator = torch.Generator().manual_seed(0)
        return tiny_sd(
            "a", num_inference_steps=5, generator=generator, height=64, width=64, output_type="latent"
        ).images

    assert torch.equal(draw(checked=True), draw(checked=False))


def make_font(folder: Path, characters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A font of squares for `characters`, the only one that fontconfig knows of."""
    font_builder = pytest.importorskip("fontTools.fontBuilder")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")
    names = {ord(character): f"glyph{number}" for number, character in enumerate(characters)}
    glyphs = {}
    for number, name in enumerate([".notdef", *names.values()]):
        pen = pens.TTGlyphPen(None)
        for corners in ([(0, 0), (0, 200 + 100 * number), (500, 500), (500, 0)],) if number else ():
            pen.moveTo(corners[0])
            for corner in corners[1:]:
                pen.lineTo(corner)
            pen.closePath()
        glyphs[name] = pen.glyph()
    builder = font_builder.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(names)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(folder / "squares.ttf")
    (folder / "fonts.conf").write_text(
        f"<fontconfig><dir>{folder}</dir><cachedir>{folder / 'cache'}</cachedir></fontconfig>"
    )
    monkeypatch.setenv("FONTCONFIG_FILE", str(folder / "fonts.conf"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(folder / "nothing"))  # where Pillow looks by itself


def test_a_caption_is_shown_in_a_font_that_has_its_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("fc-list"):
        pytest.skip("no fontconfig")
    make_font(tmp_path, "\u9ece\u660e abc", monkeypatch)
    shown, font = fonts.readable("\u9ece\u660e abc")
    assert shown == "\u9ece\u660e abc" and font.getname()[0] == "Squares"
    assert not fonts.missing(shown, font)
    assert fonts.readable("plain")[1] is fonts.default_font()


def test_a_caption_that_no_font_has_shows_code_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_font(tmp_path, "x", monkeypatch)
    shown, font = fonts.readable("a \u9ece b")
    assert shown == "a \\u9ece b (no installed font shows this)"
    assert not fonts.missing(shown, font)


def test_a_caption_wraps_by_its_pixels_also_without_spaces() -> None:
    font = fonts.default_font()
    for caption in ("W" * 60, "i" * 200, "one two " * 20, "a " + "W" * 60 + " b"):
        lines = fonts.wrap(caption, font, 200)
        assert all(font.getlength(line) <= 200 for line in lines)
        assert "".join(lines).replace(" ", "") == caption.replace(" ", "")
        longest = max(map(font.getlength, lines))
        assert longest > 150, "lines are not filled"
    assert fonts.wrap("", font, 200) == []


def test_known_messages_are_hidden_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    hide_known_messages()
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.warning("`A` requires torchvision (not installed); falling back to `APil` for backward compatibility.")
    logger.warning("something else")
    logging.getLogger("transformers").warning("requires torchvision (not installed); falling back to")
    assert caplog.messages == ["something else", "requires torchvision (not installed); falling back to"]


def test_a_warning_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    for message in ("a", "b", "a"):
        report.warn(message)
    assert capsys.readouterr().err == "warning: a\nwarning: b\n" and report.warnings == ["a", "b"]
