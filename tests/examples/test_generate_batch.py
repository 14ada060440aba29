"""The batch runner: what it makes of a file of prompts, what a rerun leaves alone, and, with Ray, what kills do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from runners.cli import UserError
from runners.model_dir import check_model_dir
from runners.stable_diffusion import batch
from scripts.benchmarks.stress_batch import workers_of
from tests.examples.conftest import Outcome
from tests.programs import ROOT

SCRIPT = ROOT / "examples" / "sd2.1" / "generate_batch.py"


@pytest.fixture
def parse(tiny_sd_dir: Path, tmp_path: Path) -> Callable[..., Namespace]:
    """Arguments for the tiny model, two steps and tmp_path/batch, with the folder of pictures made."""

    def parse(*arguments: object) -> Namespace:
        defaults = ["--prompts", tmp_path / "prompts.jsonl", "--model_path", tiny_sd_dir, "--steps", 2]
        defaults += ["--output_dir", tmp_path / "batch"]
        args = batch.parse_arguments("", SCRIPT.parent, [str(argument) for argument in [*defaults, *arguments]])
        args.model_digest = check_model_dir(args.model_path).digest()
        (args.output_dir / "images").mkdir(parents=True, exist_ok=True)
        return args

    return parse


@pytest.fixture
def run_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        code = 0
        try:
            batch.main(
                "", SCRIPT.parent, [str(argument) for argument in ["--output_dir", tmp_path / "batch", *arguments]]
            )
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capfd.readouterr())

    return run


def plan(args: Namespace, *rows: object) -> tuple[list, list]:
    return batch.plan([(f"line {number}", row) for number, row in enumerate(rows, 1)], args, "cpu")


def test_rows_come_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '\ufeff{"prompt": "Ein gro\u00dfer\u2028Kreis"}\r\n\n{"prompt\n[' + "[" * 100_000, encoding="utf-8"
    )
    (first, row), (third, broken), (fourth, deep) = batch.read_records(path)
    assert (first, third, fourth) == ("line 1", "line 3", "line 4")
    assert row == {"prompt": "Ein gro\u00dfer\u2028Kreis"}
    assert isinstance(broken, ValueError) and isinstance(deep, ValueError)


def test_rows_come_from_parquet(parse: Callable, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = pandas.DataFrame({"prompt": ["a", "b", None], "seed": [5, None, 7], "id": ["x", None, "z"]})
    table.to_parquet(tmp_path / "prompts.parquet")
    records = batch.read_records(tmp_path / "prompts.parquet")
    pictures, failures = batch.plan(records, parse("--seed", 100), "cpu")
    assert [(picture.name, picture.seed) for picture in pictures] == [("x", 5), (pictures[1].digest, 101)]
    assert [(failure.row, failure.reason) for failure in failures] == [("row 3", "prompt is empty")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ValueError("is not JSON: why"), "is not JSON: why"),
        (["a circle"], "must be an object"),
        ({"text": "a circle"}, "has no prompt"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "prompt must be text, not 3"),
        ({"prompt": "\ud800"}, "prompt is not valid Unicode"),
        ({"prompt": "a", "negative_prompt": ["b"]}, "negative_prompt must be text"),
        ({"prompt": "a", "seed": "1"}, "seed must be a whole number"),
        ({"prompt": "a", "seed": 1.5}, "seed must be a whole number"),
        ({"prompt": "a", "seed": True}, "seed must be a whole number"),
        ({"prompt": "a", "seed": -1}, "seed must be a whole number"),
        ({"prompt": "a", "seed": 2**63}, "seed must be a whole number"),
        ({"prompt": "a", "id": 1.5}, "id must be text or a whole number"),
        ({"prompt": "a", "id": "../a"}, "id '../a' must begin with"),
        ({"prompt": "a", "id": ".lock"}, "id '.lock' must begin with"),
        ({"prompt": "a", "id": "\u5706" * 43}, "128 bytes at most"),
    ],
)
def test_a_bad_row_is_a_failure_and_the_others_are_drawn(parse: Callable, row: object, reason: str) -> None:
    pictures, [failure] = plan(parse(), {"prompt": "first"}, row, {"prompt": "third", "id": "\u5706-3"})
    assert [picture.seed for picture in pictures] == [0, 2]
    assert failure.row == "line 2" and reason in failure.reason


def exchange_weights(model: Path) -> None:
    """Change one bit, and neither size nor date."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_name_is_the_id_or_hangs_on_all_that_decides_the_picture(
    parse: Callable, tiny_sd_dir: Path, tmp_path: Path
) -> None:
    other_model = shutil.copytree(tiny_sd_dir, tmp_path / "other")
    exchange_weights(other_model)

    def name(*arguments: object, kind: str = "cpu", **row: object) -> str:
        [[picture], []] = batch.plan([("line 1", {"prompt": "a", **row})], parse(*arguments), kind)
        return picture.name

    assert name() == name() == name("--workers", 3, "--retries", 1, seed=0) == name(negative_prompt="")
    others = [
        name(prompt="b"),
        name(seed=1),
        name(negative_prompt="c"),
        name("--steps", 3),
        name("--guidance_scale", 2),
        name("--height", 64),
        name("--scheduler", "euler"),
        name("--dtype", "float16"),
        name("--FA"),
        name("--FA", "--kernels", "sliced"),
        name("--TOME"),
        name("--DC"),
        name("--dynamo"),
        name("--threads", 2),
        name("--model_path", other_model),
        name(kind="npu"),
    ]
    assert len({name(), *others}) == 1 + len(others)
    assert name("--threads", 2, kind="npu") == name(kind="npu")
    assert name("--model_path", shutil.copytree(tiny_sd_dir, tmp_path / "copy")) == name()
    assert name(id="x") == name("--steps", 3, id="x", prompt="b") == "x"
    assert name(id=7) == "7"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], "line 1 and line 2 have the same id '1'"),
        ([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1}], "line 1 and line 2 are the same picture"),
    ],
)
def test_two_rows_of_one_name_are_an_error(parse: Callable, rows: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(parse(), *rows)


@pytest.fixture
def painter(parse: Callable) -> Any:
    """A worker's object, without Ray."""
    return batch.Painter(parse("--scheduler", "euler_a", "--TOME"), "cpu")


def row_of(parse: Callable, **row: object) -> tuple[Any, dict[str, Any]]:
    [[picture], []] = plan(parse("--scheduler", "euler_a", "--TOME"), {"prompt": "a red circle", **row})
    return picture, batch.asdict(picture)


def test_a_worker_draws_what_run_sd_draws(parse: Callable, painter: Any, run_sd: Callable, tmp_path: Path) -> None:
    picture, row = row_of(parse, id="x", seed=5, negative_prompt="blue")
    assert painter(row) == {"name": "x", "refusal": "", "error": "", "warning": ""}
    alone = ["--prompt", "a red circle", "--seed", 5, "--negative_prompt", "blue"]
    assert run_sd(*alone, "--scheduler", "euler_a", "--TOME").code == 0
    [expected] = (tmp_path / "out").glob("*.png")
    assert sorted(path.name for path in painter.folder.iterdir()) == ["x.json", "x.png"]
    with Image.open(painter.folder / "x.png") as ours, Image.open(expected) as theirs:
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        assert ours.text.keys() == theirs.text.keys()
        for name in ("prompt", "seed", "settings", "flags", "versions"):
            assert ours.text[name] == theirs.text[name]
    about = json.loads((painter.folder / "x.json").read_text())
    assert (about["prompt"], about["seed"], about["negative_prompt"]) == ("a red circle", 5, "blue")
    assert about["flags"]["TOME"]["ratio"] == 0.5 and about["settings"]["scheduler"].startswith("EulerAncestral")

    assert batch.is_complete(picture, painter.folder)
    before = (painter.folder / "x.png").stat().st_mtime_ns
    assert painter(row)["error"] == ""
    assert (painter.folder / "x.png").stat().st_mtime_ns == before, "drawn twice"


def test_a_worker_encodes_a_prompt_once(parse: Callable, painter: Any) -> None:
    encoded: list[int] = []
    painter.pipe.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    for number, prompt in enumerate(("a red circle", "a blue square", "a red circle")):
        _, row = row_of(parse, prompt=prompt, id=str(number), seed=number)
        assert painter(row)["error"] == ""
    assert len(encoded) == 3  # of two prompts and the negative one


def save_adapter(pipe: Any, path: Path, seed: int) -> Path:
    """A LoRA of the UNet and the text encoder, with random weights."""
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    layers = {
        "unet_lora_layers": get_peft_model_state_dict(pipe.unet),
        "text_encoder_lora_layers": get_peft_model_state_dict(pipe.text_encoder),
    }
    path.parent.mkdir(exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers)
    pipe.unload_lora_weights()
    return path


NAMES = ("ink", "night")


@pytest.mark.parametrize("flags", [["--FA"], ["--memory", "stream", "--TOME"]], ids=" ".join)
def test_each_row_is_drawn_with_its_adapters(
    parse: Callable, tiny_sd: Any, run_sd: Callable, tmp_path: Path, flags: list[str]
) -> None:
    ink, night = (save_adapter(tiny_sd, tmp_path / "loras" / f"{name}.safetensors", len(name)) for name in NAMES)
    rows: list[dict[str, Any]] = [
        {"id": "ink", "lora": "loras/ink.safetensors:0.5"},
        {"id": "none"},
        {"id": "both", "lora": ["loras/night.safetensors", str(ink)]},
        {"id": "ink-again", "seed": 0, "lora": ["loras/ink.safetensors:0.5"]},
    ]
    pictures, failures = plan(parse(*flags), *({"prompt": "a red circle", "seed": 0} | row for row in rows))
    assert not failures and len({picture.digest for picture in pictures}) == 3
    assert (
        plan(parse(*flags, "--lora", f"{ink}:0.5"), {"prompt": "a red circle", "seed": 0, "id": "ink"})[0]
        == pictures[:1]
    )
    painter = batch.Painter(parse(*flags), "cpu")
    for picture in pictures:
        assert painter(batch.asdict(picture))["error"] == ""
    drawn = {picture.name: np.asarray(Image.open(painter.folder / f"{picture.name}.png")) for picture in pictures}
    options = {"ink": ["--lora", f"{ink}:0.5"], "none": [], "both": ["--lora", night, "--lora", ink]}
    for name, loras in options.items():
        assert run_sd("--prompt", "a red circle", *flags, *loras).code == 0
        [path] = (tmp_path / "out").glob("*.png")
        # run_sd.py adds an adapter to the weights, which rounds otherwise than beside them.
        assert np.abs(np.asarray(Image.open(path)).astype(int) - drawn[name]).max() <= 1
        path.unlink()
    assert np.array_equal(drawn["ink"], drawn["ink-again"]) and not np.array_equal(drawn["ink"], drawn["none"])
    assert json.loads((painter.folder / "ink.json").read_text())["settings"]["lora"] == {str(ink): 0.5}


def test_adapters_of_a_row_that_are_none_are_its_failure(parse: Callable, tiny_sd: Any, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_sd, tmp_path / "a.safetensors", 0)
    reasons = {
        "absent.safetensors": "absent.safetensors does not exist",
        "a.safetensors:x": "'x'",
        3: "lora must be FILE, FILE:SCALE or a list of such, not 3",
        ("a.safetensors", "a.safetensors:2"): "names one adapter twice",
    }
    for lora, reason in reasons.items():
        [], [failure] = plan(parse(), {"prompt": "a", "lora": lora})
        assert reason in failure.reason and "--" not in failure.reason
    [picture], [] = plan(parse(), {"prompt": "a", "lora": str(adapter)})
    painter = batch.Painter(parse(), "cpu")
    adapter.write_bytes(save_adapter(tiny_sd, tmp_path / "b.safetensors", 1).read_bytes())
    assert "a.safetensors is not the file that the run began with" in painter(batch.asdict(picture))["error"]


def test_weights_exchanged_while_a_run_goes_on_are_refused(parse: Callable, tiny_sd_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_sd_dir, tmp_path / "model")
    args = parse("--model_path", model)
    [[picture], []] = plan(args, {"prompt": "a"})
    exchange_weights(model)
    worker = batch.Painter(args, "cpu")
    assert "has not the files that the run began with" in worker(batch.asdict(picture))["refusal"]
    assert not list(worker.folder.glob("*.png"))


def test_pictures_of_other_versions_are_counted(parse: Callable, painter: Any) -> None:
    picture, row = row_of(parse, id="x")
    painter(row)
    now = json.loads((painter.folder / "x.json").read_text())["versions"]
    assert batch.drawn_otherwise([picture], painter.folder, now) == {}
    later = now | {"diffusers": "1.0", "pillow": "99"}
    assert batch.drawn_otherwise([picture], painter.folder, later) == {f"diffusers {now['diffusers']}": 1}


def test_what_a_rerun_draws_again(parse: Callable, painter: Any) -> None:
    picture, row = row_of(parse, id="x")
    assert not batch.is_complete(picture, painter.folder)
    for damage in (
        lambda: (painter.folder / "x.png").unlink(),
        lambda: (painter.folder / "x.png").write_bytes(b""),
        lambda: (painter.folder / "x.json").unlink(),
        lambda: (painter.folder / "x.json").write_text('{"digest'),
    ):
        painter(row)
        assert batch.is_complete(picture, painter.folder)
        damage()
        assert not batch.is_complete(picture, painter.folder)
    painter(row)
    other, _ = row_of(parse, id="x", seed=1)
    with pytest.raises(UserError, match="line 1: .* has a picture 'x' of another prompt, seed, model or setting"):
        batch.is_complete(other, painter.folder)


def test_a_failing_picture_is_an_outcome(parse: Callable, painter: Any, monkeypatch: Any) -> None:
    _, row = row_of(parse, id="x")
    for error, reason in ((MemoryError(), "out of memory"), (ValueError("no way"), "ValueError: no way")):

        def draw(picture: object, error: Exception = error) -> list[str]:
            raise error

        monkeypatch.setattr(painter, "draw", draw)
        assert painter(row)["error"] == reason
        assert not list(painter.folder.iterdir())


def test_a_picture_whose_worker_dies_again_and_again_is_given_up(
    parse: Callable, painter: Any, monkeypatch: Any
) -> None:
    class Death(BaseException):
        pass

    def die(picture: object) -> list[str]:
        raise Death

    _, row = row_of(parse, id="x")
    monkeypatch.setattr(painter, "draw", die)
    for _ in range(4):  # --retries is 3
        with pytest.raises(Death):
            painter(row)
    assert painter(row)["error"] == "its worker died 4 times"
    with pytest.raises(Death):  # a rerun tries anew
        painter(row)


def test_a_worker_that_cannot_work_says_so(parse: Callable) -> None:
    _, row = row_of(parse)
    assert "has no effect: all 2 steps" in batch.Painter(parse("--cache_schedule", "0,1"), "cpu")(row)["refusal"]
    args = parse()
    (args.output_dir / "images").rmdir()
    assert "every machine must see the same --output_dir" in batch.Painter(args, "cpu")(row)["refusal"]


def test_a_folder_belongs_to_one_run_which_removes_what_killed_ones_left(tmp_path: Path) -> None:
    left = tmp_path / ".x.png.host.1.part"
    left.touch()
    with batch.locked(tmp_path):
        assert not left.exists()
        with pytest.raises(UserError, match="another run is writing"), batch.locked(tmp_path):
            pass
        left.touch()
    assert not left.exists()
    with batch.locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("arguments", "resources", "expected"),
    [
        ((), {"CPU": 8.0, "NPU": 4.0, "GPU": 2.0}, ("npu", 4)),
        ((), {"CPU": 8.0, "GPU": 2.0}, ("cuda", 2)),
        ((), {"CPU": 8.0}, ("cpu", 1)),
        (("--device", "cuda", "--workers", 1), {"CPU": 8.0, "NPU": 4.0, "GPU": 2.0}, ("cuda", 1)),
        (("--device", "npu", "--workers", 3), {"CPU": 8.0}, ("npu", 3)),  # the cluster may grow
        (("--device", "npu"), {"CPU": 8.0}, None),
    ],
)
def test_a_cluster_s_best_devices_are_chosen(
    parse: Callable, arguments: tuple, resources: dict, expected: tuple | None
) -> None:
    if expected is None:
        with pytest.raises(UserError, match="--device npu: the cluster has none"):
            batch.choose_workers(parse(*arguments), resources)
    else:
        assert batch.choose_workers(parse(*arguments), resources) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --prompts"),
        (["--prompts", "missing.jsonl"], "--prompts missing.jsonl: No such file"),
        (["--prompts", "prompts.txt"], "must be a .jsonl or a .parquet file"),
        (["--prompts", "empty.jsonl"], "holds no row"),
        (["--prompts", "binary.jsonl"], "is not UTF-8 text"),
        (["--prompts", "good.jsonl", "--device", "npu:1"], "must be npu, cuda or cpu, not 'npu:1'; Ray gives each"),
        (["--prompts", "good.jsonl", "--device", "toaster"], "not 'toaster'"),
        (["--prompts", "good.jsonl", "--workers", "0"], "argument --workers: must be 1 or more"),
        (["--prompts", "good.jsonl", "--model_path", "missing"], "missing does not exist"),
        (["--prompts", "good.jsonl", "--cache_schedule", "uniform"], "--cache_schedule uniform needs --DC"),
        (["--prompts", "good.jsonl", "--fast", "--scheduler", "heun"], "Take another --scheduler, as ddim"),
        (["--prompts", "good.jsonl"], "Ray Data is not installed"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    run_batch: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    Path("empty.jsonl").write_text("\n")
    Path("binary.jsonl").write_bytes(b"\xff\xff")
    Path("good.jsonl").write_text('{"prompt": "a"}\n')
    outcome = run_batch(*arguments)
    assert outcome.code == 2
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in outcome.err


def test_a_file_that_is_no_parquet_is_one_line(run_batch: Callable, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "bad.parquet").write_text("no")
    outcome = run_batch("--prompts", tmp_path / "bad.parquet")
    assert outcome.code == 2 and "is not a Parquet file" in outcome.err.strip().splitlines()[-1]


def test_all_good_rows_are_drawn_on_ray_and_a_rerun_has_nothing_to_do(
    parse: Callable, run_batch: Callable[..., Outcome], tiny_sd_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    rows = [{"prompt": "a red circle", "id": "x"}, {"prompt": " "}, {"prompt": "a blue square", "seed": 5, "id": "y"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ["--model_path", tiny_sd_dir, "--steps", 2, "--device", "cpu", "--workers", 2]
    settings += ["--prompts", tmp_path / "prompts.jsonl"]
    line = [sys.executable, SCRIPT, *settings, "--output_dir", tmp_path / "batch"]
    environment = os.environ | {"RAY_ADDRESS": ""}
    result = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment, check=False)

    def counts() -> dict[str, int]:
        return json.loads((tmp_path / "batch" / "report.json").read_text())["images"]

    assert result.returncode == 1
    assert "line 2: prompt is empty" in result.stderr and "Traceback" not in result.stderr
    assert counts() == {"drawn": 2, "already_there": 0, "failed": 1}
    images = tmp_path / "batch" / "images"
    assert sorted(path.name for path in images.glob("[!.]*")) == ["x.json", "x.png", "y.json", "y.png"]
    single = batch.Painter(parse(*settings, "--output_dir", tmp_path / "single"), "cpu")
    for picture in batch.plan(batch.read_records(tmp_path / "prompts.jsonl"), parse(*settings), "cpu")[0]:
        single(batch.asdict(picture))
        [ours, alone] = (np.asarray(Image.open(folder / f"{picture.name}.png")) for folder in (images, single.folder))
        assert np.array_equal(ours, alone)
    assert run_batch(*settings).code == 1
    assert counts() == {"drawn": 0, "already_there": 2, "failed": 1}


@pytest.mark.slow
def test_a_run_that_is_terminated_says_what_is_there(tiny_sd_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    rows = [{"prompt": f"circle {number}"} for number in range(500)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, SCRIPT, "--prompts", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / "batch"]
    command += ["--model_path", tiny_sd_dir, "--steps", "20", "--device", "cpu", "--workers", "1"]
    environment = os.environ | {"RAY_ADDRESS": ""}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    images = tmp_path / "batch" / "images"
    while not list(images.glob("*.json")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    run.terminate()
    out, err = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    # Ray prints lines of its own while it ends.
    assert "error: terminated by SIGTERM" in err.splitlines() and "Traceback" not in err
    assert "of 500 pictures are in" in out and "the same command goes on" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_workers_and_a_killed_run_leave_each_picture_once(
    parse: Callable, tiny_sd_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    rows = [{"prompt": f"circle {number}"} | ({"id": f"c{number}"} if number % 2 else {}) for number in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": None}])))
    settings = ["--model_path", tiny_sd_dir, "--steps", "20", "--device", "cpu", "--workers", "2"]
    command = [sys.executable, SCRIPT, "--prompts", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / "batch"]
    images = tmp_path / "batch" / "images"

    def count() -> int:
        return len(list(images.glob("*.json")))

    def start() -> subprocess.Popen:
        return subprocess.Popen([*command, *settings], stderr=subprocess.PIPE, env=os.environ | {"RAY_ADDRESS": ""})

    def wait_for(pictures: int) -> None:
        deadline = time.monotonic() + 240
        while count() < pictures:
            assert time.monotonic() < deadline and run.poll() is None, "the run does not go on"
            time.sleep(0.1)

    run = start()
    wait_for(2)
    next(workers_of(psutil.Process(run.pid))).kill()
    wait_for(6)
    workers = list(workers_of(psutil.Process(run.pid)))
    run.kill()
    run.communicate()
    assert not psutil.wait_procs(workers, timeout=60)[1], "workers outlive the run"
    assert count() < len(rows)
    first = {path: path.stat().st_mtime_ns for path in images.glob("*.json")}

    run = start()
    message = run.communicate(timeout=300)[1].decode()
    assert run.returncode == 1
    assert "line 17: prompt is empty" in message and "error: 1 pictures are missing" in message
    report = json.loads((tmp_path / "batch" / "report.json").read_text())
    assert report["images"] == {"drawn": len(rows) - len(first), "already_there": len(first), "failed": 1}
    assert all(path.stat().st_mtime_ns == written for path, written in first.items())

    pictures, _ = batch.plan(batch.read_records(tmp_path / "prompts.jsonl"), parse(*settings), "cpu")
    expected = {f"{picture.name}.{suffix}" for picture in pictures for suffix in ("png", "json")}
    assert {path.name for path in images.iterdir()} == expected | {".lock"}
    single = batch.Painter(parse(*settings, "--output_dir", tmp_path / "single"), "cpu")
    for picture in pictures:
        single(batch.asdict(picture))
        [ours, theirs] = (np.asarray(Image.open(folder / f"{picture.name}.png")) for folder in (images, single.folder))
        assert np.array_equal(ours, theirs), picture
