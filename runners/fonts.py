"""Text in pictures: a font that has a text's characters, and lines that fit a width."""

import functools
import subprocess
from collections.abc import Iterator

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

SIZE = 14  # pixels
NOT_A_CHARACTER = "\uffff"  # of which every font shows its sign for characters that it lacks
# Where fontconfig is missing. Pillow looks for these names in the folders of fonts that the system has.
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DejaVuSans.ttf",
)


@functools.cache
def default_font() -> FreeTypeFont:
    """The font that comes with Pillow, which has Latin letters."""
    return ImageFont.load_default(SIZE)  # type: ignore[return-value]  # Pillow's wheels have FreeType


def readable(text: str) -> tuple[str, FreeTypeFont]:
    """`text` and a font that has all its characters. Where none is installed, code points stand for those it lacks."""
    text = " ".join(text.split())
    if not missing(text, default_font()):
        return text, default_font()
    for font in installed_fonts(missing(text, default_font())):
        if not missing(text, font):
            return text, font
    lacking = missing(text, default_font())
    codes = "".join(f"\\u{ord(character):04x}" if character in lacking else character for character in text)
    return f"{codes} (no installed font shows this)", default_font()


def missing(text: str, font: FreeTypeFont) -> list[str]:
    """The characters of `text` that `font` lacks, each once."""
    sign = _shape(NOT_A_CHARACTER, font)
    return [character for character in dict.fromkeys(text) if character != " " and _shape(character, font) == sign]


def _shape(character: str, font: FreeTypeFont) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def installed_fonts(characters: list[str]) -> Iterator[FreeTypeFont]:
    """Fonts of this machine that may have `characters`, by fontconfig's knowledge of them and by well-known names."""
    charset = " ".join(f"{ord(character):x}" for character in characters)
    command = ["fc-list", f":outline=true:charset={charset}", "--format=%{file}|%{index}\n"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        found = ""
    lines = sorted(line.rpartition("|") for line in found.splitlines())
    for file, _, index in [*lines, *((name, "", "0") for name in WIDE_FONTS)]:
        try:
            yield ImageFont.truetype(file, SIZE, index=int(index) & 0xFFFF)  # the upper half names variations
        except OSError:
            continue  # not there, or of a kind that FreeType does not scale


def wrap(text: str, font: FreeTypeFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces, and within a word that is wider than a line.

    Chinese and Japanese have no spaces and break anywhere.
    """
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            if line and font.getlength(line + character) > width:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line] if line else lines
