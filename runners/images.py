"""Pictures read, and saved with their settings inside, side-by-side grids, and how far two pictures are apart."""

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from runners.cli import UserError
from runners.files import write_atomically
from runners.fonts import default_font, readable, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # endings of files that are looked for
LINE_HEIGHT = 18
MARGIN = 8
FIGURE_DPI = 120
LEAST_CELL_WIDTH = 192  # so that captions of small pictures stay readable


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Save `image` with `metadata` as UTF-8 text chunks, which `Image.open(path).text` gives back."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        chunks.add_itxt(key, value)
    data = io.BytesIO()
    image.save(data, format="png", pnginfo=chunks)
    write_atomically(path, data.getvalue())


def save_figure(figure: "Figure", path: Path) -> None:
    """Save a plot of matplotlib's as PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=FIGURE_DPI)
    write_atomically(path, data.getvalue())


def read_picture(flag: str, path: Path) -> Image.Image:
    """The picture in `path`, as `decode_picture` has it. `flag` is what named it, for errors."""
    return decode_picture(f"{flag} {path}", path)


def decode_picture(name: str, source: Path | BinaryIO) -> Image.Image:
    """The picture in a file the right way up, in a mode of 8 bits. `name` is what errors call it.

    Raises:
        UserError: it is no picture, damaged, larger than Pillow reads, or of 32 bits.
    """
    with open_picture(name, source) as file:
        return upright(name, file)


@contextmanager
def open_picture(name: str, source: Path | BinaryIO, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """The picture in a file, of which no more than the header is read yet, in one of Pillow's `formats` or in any.

    Raises:
        UserError: it is no such picture; or it is damaged or too large, which may show only where it is used.
    """
    try:
        with Image.open(source, formats=formats) as file:
            yield file
    except UnidentifiedImageError:
        raise UserError(f"{name} is no picture that can be read: take a PNG or JPEG file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def upright(name: str, image: Image.Image) -> Image.Image:
    """`image` the right way up, in a mode of 8 bits. Raises UserError: it is of 32 bits, or its EXIF is damaged."""
    try:
        picture = ImageOps.exif_transpose(image)
    except (struct.error, TypeError) as error:  # of Pillow, which writes the data anew once the picture is turned
        raise UserError(f"{name} has damaged EXIF data ({error}): save it without") from error
    if picture.mode.startswith("I;16"):  # which Pillow would clip at 255
        return picture.point(lambda value: value / 257, "L")
    if picture.mode in ("I", "F"):
        raise UserError(f"{name} has values of 32 bits, which have no known range: save it with 8 or 16")
    return picture


@dataclass(frozen=True)
class Similarity:
    """How alike two pictures are; `psnr` is in dB, None for equal pictures (infinite), `ssim` at most 1."""

    psnr: float | None
    ssim: float


def similarity(image: Image.Image, reference: Image.Image) -> Similarity:
    """PSNR over all pixels and mean SSIM with scikit-image's 7 x 7 window (so at least 7 x 7 pixels), of uint8 RGB."""
    pixels, expected = np.asarray(image.convert("RGB")), np.asarray(reference.convert("RGB"))
    if np.array_equal(pixels, expected):
        return Similarity(psnr=None, ssim=1.0)
    return Similarity(
        psnr=float(peak_signal_noise_ratio(expected, pixels, data_range=255)),
        ssim=float(structural_similarity(expected, pixels, data_range=255, channel_axis=2)),
    )


@dataclass(frozen=True)
class GridRow:
    """One line of a grid: a caption above pictures of one size."""

    caption: str
    images: Sequence[Image.Image]


def side_by_side(headings: Sequence[str], rows: Sequence[GridRow]) -> Image.Image:
    """A white sheet: a heading over each column, then for each row its caption and its pictures."""
    image_width = max(image.width for row in rows for image in row.images)
    cell_width = max(image_width, LEAST_CELL_WIDTH)
    sheet_width = MARGIN + len(headings) * (cell_width + MARGIN)
    captions = []
    for row in rows:
        caption, font = readable(row.caption)
        captions.append((wrap(caption, font, sheet_width - 2 * MARGIN), font))
    heights = [
        len(lines) * LINE_HEIGHT + max(image.height for image in row.images) + MARGIN
        for (lines, _), row in zip(captions, rows, strict=True)
    ]
    sheet = Image.new("RGB", (sheet_width, 2 * MARGIN + LINE_HEIGHT + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + column * (cell_width + MARGIN) for column in range(len(headings))]

    y = MARGIN
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left, y), heading, fill="black", font=default_font())
    y += LINE_HEIGHT
    for (lines, font), row, height in zip(captions, rows, heights, strict=True):
        for number, line in enumerate(lines):
            draw.text((MARGIN, y + number * LINE_HEIGHT), line, fill="dimgray", font=font)
        for left, image in zip(lefts, row.images, strict=True):
            sheet.paste(image, (left, y + len(lines) * LINE_HEIGHT))
        y += height
    return sheet
