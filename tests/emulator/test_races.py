"""The check for races against a model that keeps every access, byte by byte; operators declare what they write."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from emulator import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
RACES = build.SOURCES / "races"

Dimensions = list[tuple[int, int]]  # count and stride
REGIONS = (1000, 2000)  # of memory


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("races") / "races"
    sources = [Path(__file__).with_name("races.cpp"), RACES / "footprint.cpp", RACES / "history.cpp"]
    subprocess.run(["g++", "-std=c++20", f"-I{build.SOURCES}", *map(str, sources), "-o", str(target)], check=True)
    return target


def obey(program: Path, commands: list[str]) -> list[str]:
    done = subprocess.run([str(program)], input="\n".join(commands), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


class Footprint:
    def __init__(self, begin: int, width: int, dimensions: Dimensions) -> None:
        self.text = " ".join(map(str, [begin, width, len(dimensions), *itertools.chain(*dimensions)]))
        starts = itertools.product(*([stride * i for i in range(count)] for count, stride in dimensions))
        self.bytes = {begin + sum(start) + i for start in starts for i in range(width)}

    @classmethod
    def draw(cls, draw: random.Random) -> Footprint:
        strides = (0, 1, 2, 3, 4, 6, 8, 12, 16)
        dimensions = [(draw.randint(1, 4), draw.choice(strides)) for _ in range(draw.randint(0, 3))]
        return cls(draw.choice(REGIONS) + draw.randrange(60), draw.choice((1, 2, 4)), dimensions)


def test_footprints_overlap_where_they_have_a_byte_in_common(program: Path) -> None:
    draw = random.Random(0)
    pairs = [(Footprint.draw(draw), Footprint.draw(draw)) for _ in range(1000)]
    answers = obey(program, [f"overlap {a.text} {b.text}" for a, b in pairs])
    expected = [str(int(not a.bytes.isdisjoint(b.bytes))) for a, b in pairs]
    assert answers == expected
    assert min(answers.count("0"), answers.count("1")) > 50


def test_columns_of_a_matrix_interleave_without_a_common_byte(program: Path) -> None:
    columns = [Footprint(4096 + 2 * column, 2, [(500, 1000)]) for column in (0, 1)]
    assert obey(program, [f"overlap {columns[0].text} {columns[i].text}" for i in (0, 1)]) == ["1", "0"]


class Model:
    """Every stream, event and the host know a set of launches."""

    def __init__(self) -> None:
        self.streams: dict[int, set[int]] = {stream: set() for stream in range(4)}
        self.events: dict[int, set[int]] = {event: set() for event in range(3)}
        self.host: set[int] = set()
        self.launches: list[tuple[bool, set[int]]] = []
        self.forgotten = dict.fromkeys(REGIONS, 0)  # launches before this one

    def launch(self, stream: int, writes: bool, touched: set[int]) -> set[int]:
        """The earlier launches that this one races with."""
        known = self.streams[stream] | self.host
        forgotten = next(self.forgotten[begin] for begin in REGIONS if begin <= min(touched) < begin + 1000)
        races = {
            other
            for other, (wrote, there) in enumerate(self.launches)
            if other not in known and (writes or wrote) and other >= forgotten and not touched.isdisjoint(there)
        }
        self.streams[stream] = known | {len(self.launches)}
        self.launches.append((writes, touched))
        return races

    def record(self, event: int, stream: int) -> None:
        self.events[event] = self.streams[stream] | self.host

    def wait(self, stream: int, event: int) -> None:
        self.streams[stream] |= self.events[event]

    def synchronize_event(self, event: int) -> None:
        self.host |= self.events[event]

    def synchronize_device(self, device: int) -> None:
        self.host |= self.streams[2 * device] | self.streams[2 * device + 1]

    def forget(self, begin: int, _: int) -> None:
        self.forgotten[begin] = len(self.launches)


def random_program(draw: random.Random, steps: int) -> tuple[list[str], list[set[int]]]:
    """Commands, and what each of the launches among them races with."""
    model = Model()
    commands: list[str] = []
    races: list[set[int]] = []
    for _ in range(steps):
        kind = draw.choices(
            ("launch", "record", "wait", "synchronize_event", "synchronize_device", "forget"), (10, 4, 4, 1, 0.2, 0.5)
        )[0]
        if kind == "launch":
            stream, writes, footprint = draw.randrange(4), draw.random() < 0.4, Footprint.draw(draw)
            commands.append(f"launch {stream} {int(writes)} {footprint.text}")
            races.append(model.launch(stream, writes, footprint.bytes))
            continue
        arguments = {
            "record": (draw.randrange(3), draw.randrange(4)),
            "wait": (draw.randrange(4), draw.randrange(3)),
            "synchronize_event": (draw.randrange(3),),
            "synchronize_device": (draw.randrange(2),),
            "forget": (draw.choice(REGIONS), 1000),
        }[kind]
        getattr(model, kind)(*arguments)
        commands.append(" ".join(map(str, (kind, *arguments))))
    return commands, races


@pytest.mark.parametrize("seed", range(8))
def test_each_launch_that_races_is_found_and_no_other(program: Path, seed: int) -> None:
    """Of several that a launch races with, those that another one stands for may be left out."""
    commands, expected = random_program(random.Random(seed), 300)
    found = [set(map(int, line.split())) for line in obey(program, commands)]
    assert [bool(races) for races in found] == [bool(races) for races in expected]
    assert all(some <= everything for some, everything in zip(found, expected, strict=True))
    assert any(expected) and not all(expected)


WRITES = re.compile(r"\b(?:put|put_of_kind|put_if_given|move)\((\w+),|\b(\w+)\.(?:zero_|fill_|masked_fill_|set)\(")
OPERATOR = re.compile(r"\bACLNN\(([\w#]+),\s*\((.*?)\)\s*\{(.*?)\}\)$", re.S | re.M)


def test_operators_declare_what_they_write() -> None:
    """An output that is declared as an input would race with nothing that only reads it."""
    undeclared, count = [], 0
    for path in (build.SOURCES / "ops").glob("*.cpp"):
        text = path.read_text(encoding="utf-8").replace("\\\n", "\n")
        for name, parameters, body in OPERATOR.findall(text):
            count += 1
            inputs = set(re.findall(r"\bTensors? (\w+)", re.sub(r"\bOutTensors? \w+", "", parameters)))
            written = {a or b for a, b in WRITES.findall(body)}
            if written & inputs or not re.search(r"\bOutTensor|\bResizable|FIRST_IS_OUT|_RESULTS", parameters):
                undeclared.append(name)
    assert undeclared == []
    assert count > 60
