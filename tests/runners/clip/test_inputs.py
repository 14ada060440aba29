"""Pictures of any kind become what the model was trained on."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from runners.cli import UserError
from runners.clip.inputs import Tokens, open_rgb, prepare_pictures, prepare_texts
from tests.tiny_clip import CLIP_TOKENS, SIDE

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves() -> Image.Image:
    """Red above blue, 8 wide and 16 high."""
    image = Image.new("RGB", (8, 16), RED)
    image.paste(BLUE, (0, 8, 8, 16))
    return image


def test_turned_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    halves().save(tmp_path / "turned.png", exif=exif)
    image = open_rgb(tmp_path / "turned.png")
    assert image.getpixel((0, 0)) == BLUE and image.getpixel((0, 15)) == RED


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA", "YCbCr"])
def test_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"picture.{'tiff' if mode in ('CMYK', 'YCbCr') else 'png'}"
    halves().convert(mode).save(path)
    image = open_rgb(str(path))
    assert image.mode == "RGB" and image.size == (8, 16)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (*RED, 0))
    image.putpixel((0, 0), (*BLUE, 255))
    assert open_rgb(image).getpixel((3, 3)) == (255, 255, 255)
    assert open_rgb(image).getpixel((0, 0)) == BLUE
    palette = halves().convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert open_rgb(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_are_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert open_rgb(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole.read_bytes()[:1000])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for path in (broken, text, tmp_path / "absent.png", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            open_rgb(path)


def test_a_very_long_picture_takes_no_memory(clip_dir: Path) -> None:
    processor = AutoProcessor.from_pretrained(clip_dir)
    line = Image.new("RGB", (200_000, 4), BLUE)  # whose shorter side is scaled up eight times
    line.paste(RED, (99_990, 0, 100_010, 4))
    short = line.crop((99_900, 0, 100_100, 4))
    torch.testing.assert_close(prepare_pictures(processor, [line]), prepare_pictures(processor, [short]))


def test_bytes_are_what_is_normalised(clip_dir: Path) -> None:
    processor = AutoProcessor.from_pretrained(clip_dir)
    picture = Image.effect_noise((SIDE, SIDE), 80).convert("RGB")
    values, plain = prepare_pictures(processor, [picture]), prepare_pictures(processor, [picture], as_bytes=True)
    assert plain.dtype == torch.uint8 and plain.shape == values.shape == (1, 3, SIDE, SIDE)
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    torch.testing.assert_close((plain / 255 - mean) / std, values)


def test_an_open_picture_is_read_as_its_file(tmp_path: Path) -> None:
    deep = Image.fromarray((np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4))
    deep.save(tmp_path / "deep.png")
    turned = Image.new("RGB", (4, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("deep.png", "turned.png"):
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(np.asarray(open_rgb(image)), np.asarray(open_rgb(tmp_path / name)))
    with pytest.raises(UserError, match="values of 32 bits"):
        open_rgb(Image.new("F", (2, 2)))


def test_threads_may_share_a_tokenizer(clip_dir: Path) -> None:
    processor = AutoProcessor.from_pretrained(clip_dir)
    texts = ["short", "of a text that is too long, the end is lost " * 20]

    def prepare(number: int) -> Tokens:
        return prepare_texts(processor, texts[: 1 + number % 2], CLIP_TOKENS, pad_to_length=number % 3 == 0)

    expected = [prepare(number) for number in range(6)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(prepare, range(600)))
    for number, tokens in enumerate(found):
        assert torch.equal(tokens.input_ids, expected[number % 6].input_ids)
        assert tokens.truncated == texts[1 : 1 + number % 2]
