"""A conversion's folder is one conversion, whole, whatever ends the next one; what is a mixture is refused."""

import json
import os
from pathlib import Path

import pytest

from runners.cli import UserError
from runners.clip import run
from runners.offline.folder import CONFIG, OM, ONNX, ExportedClip, ExportedTower, read_folder, staged
from tests.programs import full_disk

NAMES = ["image_tower", "text_tower"]
KINDS = {"with": [ONNX, OM], "without": [ONNX]}


def convert(folder: Path, content: str, kinds: list[str]) -> None:
    """A conversion whose files hold `content`, as does what its settings say."""
    with staged(folder, NAMES) as stage:
        for name in (*(f"{tower}.{kind}" for tower in NAMES for kind in kinds), f"tokenizer_{content}.json"):
            (stage.folder / name).write_text(content)
        images, texts = (ExportedTower(stage.folder, name, content, [1]) for name in NAMES)
        stage.config.update(ExportedClip(images, texts, 77, {}).settings())


def content_of(folder: Path, kind: str) -> str:
    """Of a whole conversion."""
    found = read_folder(folder, kind)
    contents = {found.images.input, found.texts.input}
    contents |= {tower.path(kind).read_text() for tower in (found.images, found.texts)}
    (content,) = contents
    assert (folder / f"tokenizer_{content}.json").read_text() == content
    return content


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "out", NAMES) as stage:
        (stage.folder / "half").write_text("")
        raise RuntimeError
    assert not names_in(tmp_path / "out")
    convert(tmp_path / "out", "old", KINDS["with"])
    before = names_in(tmp_path / "out")
    with pytest.raises(RuntimeError), staged(tmp_path / "out", NAMES) as stage:
        (stage.folder / "image_tower.onnx").write_text("new")
        raise RuntimeError
    assert names_in(tmp_path / "out") == before and content_of(tmp_path / "out", OM) == "old"


def test_nothing_is_left_of_the_conversion_before(tmp_path: Path) -> None:
    convert(tmp_path, "old", KINDS["with"])
    convert(tmp_path, "new", KINDS["without"])
    assert names_in(tmp_path) == {CONFIG, "image_tower.onnx", "text_tower.onnx", "tokenizer_new.json"}
    with pytest.raises(UserError, match=r"image_tower.om is missing: convert_to_om.py clip without --onnx-only"):
        read_folder(tmp_path, OM)


def test_other_exports_are_not_described_by_this_ones_settings(tmp_path: Path) -> None:
    convert(tmp_path, "old", KINDS["with"])
    message = "holds image_tower, text_tower: give vae_decoder a folder of its own"
    with pytest.raises(UserError, match=message), staged(tmp_path, ["vae_decoder"]):
        pass
    assert content_of(tmp_path, ONNX) == "old"


@pytest.mark.parametrize("kinds", KINDS)
def test_a_kill_at_any_file_leaves_one_conversion_or_what_is_refused(
    tmp_path: Path, kinds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before the first, second, ... rename or removal of a file."""
    calls, fatal = 0, 0

    def count(change: str) -> None:
        original = getattr(Path, change)

        def counted(self: Path, *arguments: object, **options: object) -> object:
            nonlocal calls
            calls += self.name != f".{CONFIG}"
            if calls == fatal and os.getpid() != parent:
                os._exit(9)
            return original(self, *arguments, **options)

        monkeypatch.setattr(Path, change, counted)

    parent = os.getpid()
    count("replace")
    count("unlink")
    seen = set()
    for fatal in range(1, 20):
        folder = tmp_path / str(fatal)
        convert(folder, "old", KINDS["with"])
        calls = 0
        child = os.fork()
        if not child:
            convert(folder, "new", KINDS[kinds])
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        try:
            seen.add(content_of(folder, ONNX))
        except UserError as error:
            assert "a conversion was interrupted" in str(error)
            seen.add("refused")
        convert(folder, "again", KINDS["with"])  # and is mended
        assert content_of(folder, OM) == "again" and not list(folder.glob(".*"))
        if not killed:
            break
    assert not killed and fatal > 5
    assert seen == {"old", "refused", "new"}


def test_a_disk_that_is_full_at_the_settings_leaves_what_was_there(tmp_path: Path) -> None:
    convert(tmp_path, "old", KINDS["with"])
    before = names_in(tmp_path)
    with pytest.raises(OSError, match="File too large") as failed, full_disk(after=600):
        convert(tmp_path, "new", KINDS["with"])
    assert failed.value.filename == str(tmp_path)
    assert names_in(tmp_path) == before and content_of(tmp_path, OM) == "old"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("image_tower.onnx", "ol", "image_tower.onnx, which is not the file that was written with it"),
        ("tokenizer_old.json", "new", "tokenizer_old.json, which is not the file that was written with it"),
        ("text_tower.onnx", None, "text_tower.onnx, which is missing"),
        (CONFIG, None, "holds no exported CLIP, it lacks model_config.json"),
        (CONFIG, "{}", "is not what convert_to_om.py clip writes"),
        (CONFIG, '{"image', "is not valid JSON"),
    ],
)
def test_a_damaged_folder_is_one_line(
    tmp_path: Path, name: str, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tmp_path / "out", "old", KINDS["with"])
    if content is None:
        (tmp_path / "out" / name).unlink()
    else:
        (tmp_path / "out" / name).write_text(content)
    (tmp_path / "a.png").touch()
    with pytest.raises(SystemExit) as end:
        run.main("", "", ["--backend", "onnx", "--model", str(tmp_path / "out"), "--image", str(tmp_path / "a.png")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_files_of_the_other_kind_may_go(tmp_path: Path) -> None:
    convert(tmp_path, "old", KINDS["with"])
    for name in NAMES:
        (tmp_path / f"{name}.onnx").unlink()
    assert content_of(tmp_path, OM) == "old"


def test_the_settings_name_each_file(tmp_path: Path) -> None:
    convert(tmp_path, "old", KINDS["with"])
    assert json.loads((tmp_path / CONFIG).read_text())["files"].keys() == names_in(tmp_path) - {CONFIG}
