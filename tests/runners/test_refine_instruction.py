"""Instructions worded by a language model: a server of chat completions on this machine answers as it is told."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from runners.cli import UserError
from runners.hidream.edits import Edit
from runners.hidream.refine_instruction import RefinedInstruction, main, refine_edit, refine_instruction
from tests.chat_server import GOOD, Endpoint

pytest.importorskip("openai", reason="refining instructions needs openai, see requirements_npu.txt")
PICTURE = Image.new("RGBA", (3000, 1500), (255, 0, 0, 128))


def test_three_lines_are_the_answer(endpoint: Endpoint) -> None:
    refined = refine_instruction(PICTURE, " make it blue ", "some-model")
    assert refined == RefinedInstruction("A red circle on white.", "Make the circle blue.", "A blue circle on white.")
    assert refined.prompt == (
        "Editing Instruction: Make the circle blue. Target Image Description: A blue circle on white."
    )
    (request,), (key,) = endpoint.requests, endpoint.keys
    assert request["model"] == "some-model" and key == "Bearer secret"
    picture, words = request["messages"][0]["content"]
    kind, _, data = picture["image_url"]["url"].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert kind == "data:image/jpeg;base64" and sent.format == "JPEG" and sent.size == (1024, 512)
    assert "\n\nmake it blue\n\n" in words["text"]


@pytest.mark.parametrize("bad", ["", "one line", "1\n2\n3\n4", "no choice"])
def test_another_form_is_asked_again_and_never_taken(endpoint: Endpoint, bad: str) -> None:
    endpoint.answers = [bad, GOOD]
    assert refine_instruction(PICTURE, "make it blue").instruction == "Make the circle blue."
    endpoint.answers = [bad]
    with pytest.raises(UserError, match="answered 3 times with something else than three lines"):
        refine_instruction(PICTURE, "make it blue")
    assert len(endpoint.requests) == 2 + 3


def test_a_failing_endpoint_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.answers = [500, 503, GOOD]
    assert refine_instruction(PICTURE, "make it blue", retries=2).instruction == "Make the circle blue."
    endpoint.answers = [500]
    with pytest.raises(UserError, match="refused gpt-4o with 500.*told to"):
        refine_instruction(PICTURE, "make it blue", retries=1)
    assert len(endpoint.requests) == 3 + 2
    endpoint.answers = [401]
    with pytest.raises(UserError, match="refused gpt-4o with 401"):
        refine_instruction(PICTURE, "make it blue")
    assert len(endpoint.requests) == 3 + 2 + 1  # a wrong key stays wrong


def test_what_speaks_something_else_is_said(endpoint: Endpoint) -> None:
    endpoint.raw = b"<html>hello</html>"
    with pytest.raises(UserError, match="does not speak OpenAI's chat completions"):
        refine_instruction(PICTURE, "make it blue", retries=0)


def test_what_cannot_be_asked(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the instruction is empty"):
        refine_instruction(PICTURE, " ")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")  # of which the system lets nobody take the port
    with pytest.raises(UserError, match="cannot reach http://127.0.0.1:9/v1/.*OPENAI_BASE_URL"):
        refine_instruction(PICTURE, "make it blue", retries=0)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        refine_instruction(PICTURE, "make it blue")
    assert not endpoint.requests


def test_an_edit_keeps_a_description_of_its_own(endpoint: Endpoint, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    edit = Edit(tmp_path / "a.png", "make it blue", None, 0, "a")
    refined = refine_edit(edit)
    assert (refined.instruction, refined.target_description) == ("Make the circle blue.", "A blue circle on white.")
    assert refine_edit(Edit(edit.image, "make it blue", "mine", 0, "a")).target_description == "mine"


def test_the_program_prints_the_prompt(endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PICTURE.save(tmp_path / "a.png")
    main("", ["--src_image", str(tmp_path / "a.png"), "--src_instruction", "make it blue", "--model", "m"])
    assert capsys.readouterr().out.startswith("Editing Instruction: Make the circle blue. Target")
    with pytest.raises(SystemExit) as end:
        main("", ["--src_image", str(tmp_path / "absent.png"), "--src_instruction", "x"])
    assert end.value.code == 2 and "absent.png" in capsys.readouterr().err
