"""Where pictures and captions come from, what is left out of them, and what is kept of them on disk."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors.torch import load_file

from runners.cli import UserError
from runners.training.cache import Sizes
from runners.training.pictures import Picture, Skipped, read_pictures
from tests.training_work import losses, train, write_pictures


def found(source: Path, skipped: Skipped) -> dict[str, str]:
    return {picture.name: picture.caption for picture in read_pictures(source, "image", "text", skipped)}


def test_captions_of_metadata_and_beside_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / "sub", 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.jpg")
    (tmp_path / "alone.txt").write_text("beside\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "silent.png")
    with (tmp_path / "sub/metadata.jsonl").open("a") as metadata:
        metadata.write(json.dumps({"file_name": "gone.png", "text": "not there"}) + "\n\n")
        metadata.write(json.dumps({"file_name": "1.png", "other": "x"}) + "\n")
    skipped = Skipped()
    assert found(tmp_path, skipped) == {"alone.jpg": "beside", "sub/0.png": "picture 0", "sub/1.png": "picture 1"}
    assert skipped.reasons.keys() == {"silent.png", "sub/gone.png", "sub/metadata.jsonl:5"}


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", write_pictures(tmp_path / "elsewhere", 1)
    write_pictures(data / "own", 1)
    (elsewhere / "back").symlink_to(data)
    (data / "far").symlink_to(elsewhere)
    (data / "again").symlink_to(data / "own")  # before "own" in the order of names
    (data / "lost").symlink_to(tmp_path / "nowhere")
    skipped = Skipped()
    assert found(data, skipped) == {"far/0.png": "picture 0", "own/0.png": "picture 0"}
    assert not skipped.reasons
    (tmp_path / "shards").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"a"], "text": ["x"]}), tmp_path / "shards/0.parquet")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/shards").symlink_to(tmp_path / "shards")
    assert found(tmp_path / "linked", skipped) == {"shards/0.parquet:0": "x"}


def test_text_files_of_any_editor(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    (tmp_path / "metadata.jsonl").write_bytes(
        '\ufeff{"file_name": "0.png", "text": "a\u2028b\x85"}\r\n{"file_name": "1.png", "text": "c"}\r\n'.encode()
    )
    (tmp_path / "2.txt").write_bytes("\ufeffd\r\n".encode())
    assert found(tmp_path, Skipped()) == {"0.png": "a\u2028b", "1.png": "c", "2.png": "d"}
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"metadata\.jsonl is no UTF-8 text"):
        found(tmp_path, Skipped())


def test_names_and_captions_that_are_no_text_are_left_out(tmp_path: Path, small_sd_dir: Path) -> None:
    data = write_pictures(tmp_path / "data", 2)
    (data / "0.png").rename(data / os.fsdecode(b"\xe9.png"))
    rows = [("0\0.png", "a"), ("0\ud800.png", "a"), ("1.png", "a\ud83d"), ("1.png", "b")]
    (data / "metadata.jsonl").write_text("".join(json.dumps({"file_name": a, "text": b}) + "\n" for a, b in rows))
    made = train(data, small_sd_dir, tmp_path / "made", steps=1)
    assert json.loads((made / "report.json").read_text())["pictures"] == 1
    skipped = json.loads((made / "skipped.json").read_text())
    assert skipped.keys() == {"0\0.png", "0?.png", "metadata.jsonl:3", "?.png"}


def test_each_row_of_a_picture_is_an_example(tmp_path: Path, small_sd_dir: Path) -> None:
    data = write_pictures(tmp_path / "data", 2)
    with (data / "metadata.jsonl").open("a") as metadata:
        metadata.write(json.dumps({"file_name": "0.png", "text": "another"}))
    captions = [picture.caption for picture in read_pictures(data, "image", "text", Skipped())]
    assert captions == ["picture 0", "another", "picture 1"]
    made = train(data, small_sd_dir, tmp_path / "made", steps=1)
    assert json.loads((made / "report.json").read_text())["pictures"] == 3


def test_rows_of_parquet(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "png")
    rows = [
        {"image": {"bytes": data.getvalue(), "path": None}, "text": "one"},
        {"image": {"bytes": None, "path": "elsewhere.png"}, "text": "two"},
        {"image": {"bytes": data.getvalue(), "path": None}, "text": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    skipped = Skipped()
    assert found(tmp_path, skipped) == {"rows.parquet:0": "one"}
    assert skipped.reasons.keys() == {"rows.parquet:1", "rows.parquet:2"}
    with pytest.raises(UserError, match=r"no words: see --image_column and --caption_column"):
        list(read_pictures(tmp_path / "rows.parquet", "image", "words", skipped))
    (tmp_path / "sub").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[1:]), tmp_path / "sub/rows.parquet")
    skipped = Skipped()
    assert found(tmp_path, skipped) == {"rows.parquet:0": "one"}
    assert skipped.reasons.keys() == {
        f"{file}:{row}"
        for file, row in (("rows.parquet", 1), ("rows.parquet", 2), ("sub/rows.parquet", 0), ("sub/rows.parquet", 1))
    }
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="is no Parquet file"):
        found(tmp_path / "bad.parquet", skipped)
    damaged = bytearray((tmp_path / "rows.parquet").read_bytes())
    damaged[4:80] = b"\xff" * 76  # where pages begin: their header, and what is compressed
    (tmp_path / "bad.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match="or damaged"):
        found(tmp_path / "bad.parquet", skipped)


def test_pictures_beside_parquet_are_left_out_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path / "loose", 1)
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"a"], "text": ["x"]}), tmp_path / "0.parquet")
    skipped = Skipped()
    assert found(tmp_path, skipped) == {"0.parquet:0": "x"}
    assert skipped.reasons == {"loose/0.png": "beside Parquet files, of which the rows alone are read"}


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-training\.txt"):
        found(tmp_path, Skipped())


def test_pictures_of_other_formats_are_left_out_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    for name in ("a.gif", "b.SVG", ".hidden.gif", "notes.md"):
        (tmp_path / name).touch()
    skipped = Skipped()
    assert found(tmp_path, skipped) == {"0.png": "picture 0"}
    assert skipped.reasons.keys() == {"a.gif", "b.SVG"}


def test_no_row_at_all_is_said(tmp_path: Path, small_sd_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = pyarrow.table(
        {"image": pyarrow.array([], pyarrow.binary()), "text": pyarrow.array([], pyarrow.string())}
    )
    pyarrow.parquet.write_table(nothing, tmp_path / "rows.parquet")
    with pytest.raises(SystemExit):
        train(tmp_path / "rows.parquet", small_sd_dir, tmp_path / "made", steps=1)
    assert "there is no row" in capsys.readouterr().err


def test_metadata_that_is_none_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\nnothing\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl:2 is no row such as"):
        found(tmp_path, Skipped())


def test_broken_pictures_are_left_out(tmp_path: Path, small_sd_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pictures(tmp_path / "data", 4)
    whole = (data / "3.png").read_bytes()
    (data / "3.png").write_bytes(whole[: len(whole) // 2])
    (data / "2.png").write_bytes(b"")
    made = train(data, small_sd_dir, tmp_path / "made", steps=1)
    skipped = json.loads((made / "skipped.json").read_text())
    assert skipped.keys() == {"2.png", "3.png"}
    assert "2 pictures are left out, as 2.png: is no picture" in capsys.readouterr().err
    assert len(losses(made)) == 1
    for name in ("2.png", "3.png"):
        (data / name).write_bytes(whole)
    train(data, small_sd_dir, made, "--resume", steps=2)
    assert not (made / "skipped.json").exists()


def test_transparency_is_white_and_other_modes_are_rgb() -> None:
    for image in (Image.new("LA", (4, 4), (0, 0)), Image.new("RGBA", (4, 4), (255, 0, 0, 0))):
        data = io.BytesIO()
        image.save(data, "png")
        assert Picture("a", "", data.getvalue()).decode().getpixel((0, 0)) == (255, 255, 255)


def test_a_damaged_exif_tag_is_an_error_of_the_picture() -> None:
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x010E], exif[0x0112] = "text", 6  # a description, and turned
    Image.new("RGB", (8, 8)).save(data, "jpeg", exif=exif)
    description = b"\x01\x0e\x00\x02"  # the tag, and that it is text
    for tag in (b"\x01\x02", b"\x01\x1b"):  # of bits and of resolution, which are numbers
        damaged = data.getvalue().replace(description, tag + description[2:])
        with pytest.raises(UserError, match="a has damaged EXIF data"):
            Picture("a", "", damaged).decode()


def test_buckets_keep_shapes(tmp_path: Path, small_sd_dir: Path) -> None:
    sizes = Sizes.of(512, aspect_ratio_buckets=True)
    assert sizes.of_picture(Image.new("RGB", (1600, 900))) == (384, 704)
    assert Sizes.of(512, aspect_ratio_buckets=False).of_picture(Image.new("RGB", (1600, 900))) == (512, 512)
    data = write_pictures(tmp_path / "data", 3)
    Image.fromarray(np.zeros((64, 128, 3), dtype=np.uint8)).save(data / "2.png")
    made = train(data, small_sd_dir, tmp_path / "made", "--aspect_ratio_buckets", "--resolution", 128, steps=4)
    shapes = {load_file(file)["mean"].shape for file in (tmp_path / "cache/latents").rglob("*.safetensors")}
    assert len(shapes) == 2
    assert len(losses(made)) == 4


def test_what_is_cached_is_named_by_what_it_depends_on(tmp_path: Path, small_sd_dir: Path, tiny_sd_dir: Path) -> None:
    data = write_pictures(tmp_path / "data", 2)
    first = train(data, small_sd_dir, tmp_path / "first", steps=1)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(files) == 2 + 2 + 1  # and the empty caption
    again = train(data, small_sd_dir, tmp_path / "again", steps=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == files
    assert losses(first) == losses(again)
    next(iter(files)).write_bytes(b"damaged")
    assert losses(train(data, small_sd_dir, tmp_path / "third", steps=1)) == losses(first)
    train(data, tiny_sd_dir, tmp_path / "other", steps=1)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 * len(files)


def test_pictures_that_are_enlarged_are_said(
    tmp_path: Path, small_sd_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(tmp_path / "data", 2)
    Image.new("RGB", (48, 512)).save(data / "1.png")
    for _ in range(2):  # also where they are found on disk
        train(data, small_sd_dir, tmp_path / "made", "--resume", "--resolution", "64", steps=1)
        assert "1 of 2 pictures are smaller than they are trained" in capsys.readouterr().err


def test_captions_that_are_cut_are_said(
    tmp_path: Path, small_sd_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(tmp_path / "data", 2)
    (data / "metadata.jsonl").write_text(
        json.dumps({"file_name": "0.png", "text": "a" * 80}) + "\n" + json.dumps({"file_name": "1.png", "text": "b"})
    )
    for _ in range(2):  # also where they are found on disk
        train(data, small_sd_dir, tmp_path / "made", "--resume", steps=1)
        assert "1 captions are cut, by up to 5 tokens" in capsys.readouterr().err


def test_flips_are_learnt(tmp_path: Path, small_sd_dir: Path) -> None:
    data = write_pictures(tmp_path / "data", 2)
    plain = train(data, small_sd_dir, tmp_path / "plain", steps=4)
    flipped = train(data, small_sd_dir, tmp_path / "flipped", "--random_flip", steps=4)
    different = [a != b for a, b in zip(losses(plain), losses(flipped), strict=True)]
    assert any(different)
