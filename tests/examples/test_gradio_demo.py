"""The page for the browser: by gradio's client, and, among the slow cases, in a real headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runners.hidream.arguments import DEMO_DESCRIPTION, DEMO_IMAGE, DEMO_INSTRUCTION
from tests.chat_server import Endpoint, chat_server
from tests.programs import ROOT, environment

EXAMPLES = ROOT / "examples/hidream_e1"
PROGRAM, SHAPES = EXAMPLES / "gradio_demo_npu.py", EXAMPLES / DEMO_IMAGE
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds, of a step that takes a few seconds

gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio, see requirements_gradio.txt")


@pytest.fixture(scope="module")
def words() -> Iterator[Endpoint]:
    """The language model that the page asks."""
    with chat_server() as made:
        yield made


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, words: Endpoint) -> Iterator[str]:
    """Of the page, served with the demo models on the CPU."""
    environ = environment(HF_HUB_OFFLINE="1", TMPDIR=str(tmp_path_factory.mktemp("served")))
    environ |= {"OPENAI_BASE_URL": words.url, "OPENAI_API_KEY": "secret"}
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, text=True) as server:
        try:
            line = server.stdout.readline()
            yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        finally:
            server.terminate()
    assert not list(Path(environ["TMPDIR"]).iterdir()), "the page left files behind"


@pytest.fixture
def edit(address: str) -> Callable[..., tuple[Image.Image, dict[str, Any]]]:
    """Edits pictures by a client of its own: the results, and how they were made."""

    def run(*pictures: Path, instruction: str = DEMO_INSTRUCTION, **changes: Any) -> tuple[list[Any], list[Any]]:
        client = gradio_client.Client(address, verbose=False)
        options = {"model_name": "HiDream-E1.1", "description": DEMO_DESCRIPTION, "negative_prompt": "", "steps": 10}
        options |= {"guidance_scale": 1.5, "image_guidance_scale": 1.5, "refine_strength": 0.3, "clip_cfg_norm": True}
        uploads = [{"image": gradio_client.handle_file(picture), "caption": None} for picture in pictures]
        options |= {
            "language": "en",
            "seed": 3,
            "pictures": uploads,
            "instruction": instruction,
            "refine_words": False,
        } | changes
        files = client.predict(**options, api_name="/edit")[2]
        paths = [Path(path) for path in (files["value"] if isinstance(files, dict) else files)]
        return (
            [Image.open(path) for path in paths if path.suffix == ".png"],
            [json.loads(path.read_text()) for path in paths if path.suffix == ".json"],
        )

    return run


def test_edits_are_those_of_the_runner(edit: Callable[..., Any], tmp_path: Path) -> None:
    from runners.hidream.arguments import E1_1
    from runners.hidream.run import main

    wanted = ["--device", "cpu", "--steps", "10", "--negative_prompt", "", "--output_dir", str(tmp_path)]
    main("inference_e1_1_npu.py", "", E1_1, EXAMPLES, wanted)
    (result,), (about,) = edit(SHAPES)
    with Image.open(tmp_path / "shapes.png") as expected:
        assert result.tobytes() == expected.tobytes() and result.size == expected.size
    of_the_runner = json.loads((tmp_path / "shapes.json").read_text())
    same = of_the_runner.keys() - {"digest", "seconds", "input_image", "flags"}
    assert {key: about[key] for key in same} == {key: of_the_runner[key] for key in same}
    assert about["input_image"] == "shapes.png"
    assert json.loads(result.text["instruction"]) == DEMO_INSTRUCTION


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": "  "}, "the instruction is empty"),
        ({"instruction": "", "language": "zh"}, "编辑指令为空"),
        ({"pictures": None}, "upload a picture first"),
        ({"steps": 200}, "200"),
    ],
)
def test_what_cannot_be_edited_is_said(edit: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        edit(SHAPES, **changes)


def test_a_broken_picture_does_not_stop_others(edit: Callable[..., Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(gradio_client.exceptions.AppError, match="cannot read the picture broken.png: cannot identify"):
        edit(broken)
    results, about = edit(SHAPES, broken)
    assert len(results) == 1 and about[0]["input_image"] == "shapes.png"


def test_a_language_model_words_the_instruction(edit: Callable[..., Any], words: Endpoint) -> None:
    pytest.importorskip("openai", reason="refining instructions needs openai, see requirements_npu.txt")
    _, (about,) = edit(SHAPES, description="", refine_words=True)
    assert about["instruction"] == "Make the circle blue." and about["original_instruction"] == DEMO_INSTRUCTION
    assert about["target_description"] == "A blue circle on white." and len(words.requests) == 1


def test_drawings_come_with_their_seeds(address: str) -> None:
    client = gradio_client.Client(address, verbose=False)
    options = {"prompt": "a large red circle", "negative_prompt": "", "steps": 2, "guidance_scale": 1.5, "seed": 5}
    gallery, files, *_ = client.predict(language="en", num_images=2, **options, api_name="/draw")
    paths = [Path(path) for path in files["value"]]
    assert len(gallery) == 2
    assert [path.name for path in paths] == ["seed_5.png", "seed_5.json", "seed_6.png", "seed_6.json"]
    assert json.loads(paths[3].read_text())["seed"] == 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
    found = list(filter(None, map(shutil.which, BROWSERS)))
    if not found:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Person:
    """Somebody with a browser of their own; screenshots go to $SCREENSHOTS, where that is set."""

    def __init__(self, browser: Any, address: str) -> None:
        self.page = browser.new_context(accept_downloads=True).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.foreign: list[str] = []
        self.page.on("request", self._note)
        self.page.goto(address)
        self.page.wait_for_selector("#edit")

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.foreign.append(request.url)

    def upload(self, *pictures: Path) -> None:
        self.page.click("#pictures button[aria-label='Clear']")
        self.page.set_input_files("#pictures input[type=file]", list(pictures))
        self.page.wait_for_function(
            "count => document.querySelectorAll('#pictures .thumbnail-item').length == count", arg=len(pictures)
        )

    def say(self, instruction: str) -> None:
        self.page.fill("#instruction textarea", instruction)

    def start(self) -> None:
        self.page.click("#edit")

    def results(self, count: int) -> list[bytes]:
        """The files that there are to download, once there are `count`."""
        links = self.page.locator("#edit-files a[download]")
        links.nth(count - 1).wait_for()
        contents = []
        for number in range(count):
            with self.page.expect_download() as download:
                links.nth(number).click()
            contents.append(Path(download.value.path()).read_bytes())
        return contents

    def message(self) -> str:
        """What the page says in a box, which is closed then."""
        said = self.page.inner_text(".toast-body")
        self.page.click(".toast-close")
        return said

    def wait_for_status(self, word: str) -> None:
        self.page.wait_for_function("word => document.querySelector('#status').innerText.includes(word)", arg=word)

    def look(self, name: str) -> None:
        if "SCREENSHOTS" in os.environ:
            self.page.screenshot(path=Path(os.environ["SCREENSHOTS"], f"{name}.png"), full_page=True)


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[[], Person]]:
    people: list[Person] = []

    def come() -> Person:
        people.append(Person(browser, address))
        return people[-1]

    yield come
    for person in people:
        person.page.context.close()
        assert not person.foreign, "the page asked other hosts"


def copies(count: int, folder: Path) -> list[Path]:
    return [Path(shutil.copy(SHAPES, folder / f"{number}.png")) for number in range(count)]


@pytest.mark.slow
def test_a_person_edits_a_picture_and_compares(visit: Callable[[], Person], tmp_path: Path) -> None:
    person = visit()
    assert "no model loaded" in person.page.inner_text("#status") or "demo_model" in person.page.inner_text("#status")
    person.upload(*copies(1, tmp_path))
    person.start()
    png, about = person.results(2)
    assert json.loads(about)["instruction"] == DEMO_INSTRUCTION and png.startswith(b"\x89PNG")
    person.wait_for_status("HiDream-E1.1")
    shown = person.page.locator("#compare img")
    assert shown.count() == 2 and shown.nth(0).get_attribute("src") != shown.nth(1).get_attribute("src")
    handle = person.page.locator("#compare .handle, #compare .outer").first.bounding_box()
    person.look("edited")
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    person.page.mouse.move(x, y)
    person.page.mouse.down()
    person.page.mouse.move(x - 120, y)
    person.page.mouse.up()
    moved = person.page.locator("#compare .handle, #compare .outer").first.bounding_box()
    assert moved["x"] < handle["x"] - 60
    person.look("compared")


@pytest.mark.slow
def test_several_pictures_are_chosen_from(visit: Callable[[], Person], tmp_path: Path) -> None:
    person = visit()
    person.upload(*copies(2, tmp_path), Path(shutil.copy(EXAMPLES.parent / "sd2.1/comparison.png", tmp_path)))
    person.start()
    person.results(6)
    before = person.page.locator("#compare img").nth(1).get_attribute("src")
    person.page.locator("#results .thumbnail-item").nth(2).click()
    person.page.wait_for_function(
        "before => document.querySelectorAll('#compare img')[1].getAttribute('src') != before", arg=before
    )
    person.look("several")


@pytest.mark.slow
def test_what_goes_wrong_is_said_in_the_persons_language(visit: Callable[[], Person], tmp_path: Path) -> None:
    person = visit()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    person.upload(tmp_path / "broken.png")
    person.start()
    assert "cannot read the picture broken.png" in person.message()
    person.page.click("#language label:has-text('中文')")
    person.page.wait_for_selector("#edit:has-text('开始编辑')")
    person.say("")
    person.start()
    assert "编辑指令为空" in person.message()
    person.look("chinese")


@pytest.mark.slow
def test_cancelling_ends_an_edit_and_the_next_person_goes_on(visit: Callable[[], Person], tmp_path: Path) -> None:
    one, other = visit(), visit()
    one.upload(*copies(24, tmp_path))
    one.start()
    one.page.wait_for_selector("text=/picture 2 of 24/")
    other.start()  # waits for its turn
    one.look("editing")
    other.look("waiting")
    one.page.click("#cancel-edit")
    assert "cancelled" in one.message()
    assert json.loads(other.results(2)[1])["input_image"] == "shapes.png"
    one.wait_for_status("ready")
    one.look("cancelled")
    assert not one.page.locator("#edit-files a[download]").count()
    one.upload(*copies(1, tmp_path))
    one.start()
    assert json.loads(one.results(2)[1])["input_image"] == "0.png"


@pytest.mark.slow
def test_two_people_at_once_get_their_own(visit: Callable[[], Person], tmp_path: Path) -> None:
    instructions = ("make the circle red", "remove the circle")
    alone = []
    for instruction in instructions:
        person = visit()
        person.say(instruction)
        person.start()
        alone.append(person.results(2))
    people = [visit() for _ in instructions]
    for person, instruction in zip(people, instructions, strict=True):
        person.say(instruction)
    for person in people:
        person.start()
    assert [person.results(2) for person in people] == alone
    assert alone[0] != alone[1]


@pytest.mark.slow
def test_a_person_draws(visit: Callable[[], Person]) -> None:
    person = visit()
    person.page.click("button[role=tab]:has-text('Draw')")
    person.page.click("#draw")
    person.page.locator("#draw-files a[download]").first.wait_for()
    assert person.page.locator("#drawn img").count() == 1
    person.wait_for_status("Stable Diffusion")
    person.look("drawn")
