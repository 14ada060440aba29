"""The Stable Diffusion runner from its command line to its files, on a tiny random model."""

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
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from runners.cli import UserError
from runners.clip import CLIPInferenceService
from runners.report import Report
from tests.programs import ROOT
from tests.tiny_clip import save_tiny_clip

PROMPT = ("--prompt", "a red circle")


def pixels(folder: Path, pattern: str = "[0-9]*.png") -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob(pattern))]


def read_report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_a_run_leaves_pictures_a_report_and_a_table(run_sd: Callable, tmp_path: Path) -> None:
    outcome = run_sd(*PROMPT, "--prompt", "Ein großer Kreis", "--num_images", 2, "--height", 64)
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    assert [image["seed"] for image in report["images"]] == [0, 1, 2, 3]
    assert [image["prompt"] for image in report["images"]] == ["a red circle"] * 2 + ["Ein großer Kreis"] * 2
    for entry in report["images"]:
        with Image.open(tmp_path / "out" / entry["file"]) as image:
            assert image.size == (128, 64)  # the width is the model's own though the height was given
            assert image.text["prompt"] == entry["prompt"]
            assert image.text["seed"] == str(entry["seed"])
            assert json.loads(image.text["settings"])["steps"] == 2
    assert report["device"]["type"] == "cpu" and report["device"]["dtype"] == "torch.float32"
    assert report["versions"]["diffusers"].startswith("0.42.1")
    assert report["flags"] == {"FA": None, "TOME": None, "DC": None, "fast": None, "dynamo": None}
    assert report["load_seconds"] > 0
    assert 0 < report["costs"]["seconds_per_step"] * 2 <= report["costs"]["seconds_per_image"] * 2
    assert report["costs"]["peak_memory_bytes"] > 1e8
    assert "per image (s)" in outcome.out and "per step (s)" in outcome.out
    assert not list((tmp_path / "out").glob(".*")), "a scratch file was left behind"


def test_the_same_seed_gives_the_same_picture_on_every_run(run_sd: Callable, tmp_path: Path) -> None:
    for name in ("once", "again"):
        assert run_sd(*PROMPT, "--seed", 7, "--output_dir", tmp_path / name).code == 0
    assert run_sd(*PROMPT, "--seed", 8, "--output_dir", tmp_path / "other").code == 0
    once, again, other = (pixels(tmp_path / name)[0] for name in ("once", "again", "other"))
    assert np.array_equal(once, again)
    assert np.abs(once - other).mean() > 1


def test_one_picture_of_many_is_drawn_again_alone_from_its_metadata(run_sd: Callable, tmp_path: Path) -> None:
    # euler_a adds noise at each step, so that the picture hangs on its generator all along
    assert run_sd(*PROMPT, "--prompt", "b", "--num_images", 2, "--scheduler", "euler_a").code == 0
    last = sorted((tmp_path / "out").glob("[0-9]*.png"))[-1]
    about = Image.open(last).text
    again = run_sd(
        "--prompt",
        about["prompt"],
        "--seed",
        about["seed"],
        "--scheduler",
        "euler_a",
        "--output_dir",
        tmp_path / "again",
    )
    assert again.code == 0
    difference = np.abs(pixels(tmp_path / "again")[0] - np.asarray(Image.open(last)).astype(int))
    assert difference.max() <= 1  # a batch of one sums in another order than a batch of two


@pytest.mark.parametrize(
    ("arguments", "flag", "expected"),
    [
        (["--FA"], "FA", {"kernel": "scaled_dot_product_attention"}),
        (["--TOME"], "TOME", {"ratio": 0.5, "blocks": 4}),
        (["--TOME", 0.25], "TOME", {"ratio": 0.25, "blocks": 4}),
        (["--DC"], "DC", {"cache_interval": 3, "full_steps": 2, "shallow_steps": 3}),
        (
            ["--DC", 2, "--cache_schedule", "quadratic:2,1.2"],
            "DC",
            {"cache_interval": 2, "cache_center": 2, "cache_power": 1.2},
        ),
        (["--cache_schedule", "0,3"], "DC", {"cache_schedule": [0, 3], "full_steps": 2, "shallow_steps": 3}),
        (
            ["--cache_schedule", "early:2", "--forecast", "mixed"],
            "DC",
            {"cache_forecast": True, "full_steps": 2, "shallow_steps": 1, "skipped_steps": 2},
        ),
    ],
)
def test_each_acceleration_takes_effect_and_is_reported(
    run_sd: Callable, tmp_path: Path, arguments: list, flag: str, expected: dict
) -> None:
    outcome = run_sd(*PROMPT, "--steps", 5, "--compare", *arguments)
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    assert expected.items() <= report["flags"].pop(flag).items()
    assert not any(report["flags"].values()), "another flag is on"
    [similarity] = report["comparison"]["images"]
    if flag == "FA":  # on the CPU the same kernel as diffusers', to the bit
        assert similarity == {"psnr": None, "ssim": 1.0}
    else:  # another picture, but close to the plain one
        assert 15 < similarity["psnr"] < 100
        assert 0.5 < similarity["ssim"] < 1
    assert report["comparison"]["speed_up"] > 0


def test_compare_puts_plain_and_accelerated_pictures_side_by_side(run_sd: Callable, tmp_path: Path) -> None:
    outcome = run_sd(*PROMPT, "--TOME", "--compare", "--width", 256)
    assert outcome.code == 0, outcome.err
    assert run_sd(*PROMPT, "--width", 256, "--output_dir", tmp_path / "plain").code == 0
    grid = np.asarray(Image.open(tmp_path / "out" / "comparison.png")).astype(int)
    for folder, side in (("plain", slice(8, 264)), ("out", slice(272, 528))):
        [picture] = pixels(tmp_path / folder)
        assert np.array_equal(grid[-8 - 128 - 8 : -16, side], picture) or any(
            np.array_equal(grid[top : top + 128, side], picture) for top in range(grid.shape[0] - 127)
        ), f"the picture of {folder} is not where it belongs"
    for word in ("plain", "accelerated", "speed-up", "PSNR (dB)", "SSIM"):
        assert word in outcome.out


def test_compare_scores_both_by_clip(run_sd: Callable, tmp_path: Path) -> None:
    model = save_tiny_clip(tmp_path / "clip")
    outcome = run_sd(*PROMPT, "--TOME", 0.75, "--compare", "--num_images", 2, "--clip_model", model)
    assert outcome.code == 0, outcome.err
    scores = read_report(tmp_path / "out")["comparison"]["clip_score"]
    drawn = sorted(path for path in (tmp_path / "out").glob("*.png") if path.name != "comparison.png")
    service = CLIPInferenceService(str(model), "cpu")
    assert scores["accelerated"] == pytest.approx(service.clip_scores(drawn, [PROMPT[1]] * 2), abs=1e-3)
    assert len(scores["plain"]) == 2 and scores["plain"] != scores["accelerated"]
    assert "CLIP score" in outcome.out


def test_prompts_come_from_a_file_too(run_sd: Callable, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffone\n\n  two  \n", encoding="utf-8")
    assert run_sd("--prompt", "zero", "--prompt_file", tmp_path / "prompts.txt").code == 0
    assert [image["prompt"] for image in read_report(tmp_path / "out")["images"]] == ["zero", "one", "two"]


def test_what_has_no_effect_is_said(run_sd: Callable, tmp_path: Path) -> None:
    outcome = run_sd("--prompt", "a" * 100, "--soc_version", "Ascend310P3", "--local_rank", 1)
    assert outcome.code == 0
    warnings = read_report(tmp_path / "out")["warnings"]
    for part in (
        "102 tokens is cut after 77",
        "--soc_version Ascend310P3 has no effect",
        "local rank 1 has no effect",
    ):
        assert sum(part in warning for warning in warnings) == 1
        assert part in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", "a", "--steps", "0"], 2, "argument --steps: must be 1 or more, not 0"),
        (["--prompt", "a", "--steps", "many"], 2, "argument --steps: must be a whole number, not 'many'"),
        (["--prompt", "a", "--height", "100"], 2, "argument --height: must be a multiple of 8, not 100; 96 is near"),
        (["--prompt", "a", "--width", "0"], 2, "argument --width: must be 1 or more, not 0"),
        (["--prompt", "a", "--guidance_scale", "nan"], 2, "argument --guidance_scale: must be a number, not 'nan'"),
        (["--prompt", "a", "--num_images", "0"], 2, "argument --num_images: must be 1 or more"),
        (["--prompt", "a", "--seed", "-1"], 2, "argument --seed: must be 0 or more, not -1"),
        (["--prompt", "a", "--seed", str(2**63)], 2, "is too large"),
        (["--prompt", "a", "--scheduler", "eular"], 2, "'eular' (choose from"),
        (["--prompt", "a", "--TOME", "0"], 2, "argument --TOME: must be more than 0"),
        (["--prompt", "a", "--TOME", "0.8"], 2, "takes a ratio from 0 to 0.75, got 0.8"),
        (["--prompt", "a", "--DC", "1"], 2, "argument --DC: must be 2 or more"),
        (["--prompt", "a", "--cache_schedule", "uniform"], 2, "--cache_schedule uniform needs --DC"),
        (["--prompt", "a", "--DC", "--cache_schedule", "cubic"], 2, "not 'cubic'"),
        (["--prompt", "a", "--DC", "--cache_schedule", "quadratic:x"], 2, "not 'quadratic:x'"),
        (["--prompt", "a", "--DC", "4", "--cache_schedule", "0,2"], 2, "--DC 4 has no meaning beside"),
        (["--prompt", "a", "--cache_schedule", "1,4", "--steps", "5"], 2, "must contain step 0"),
        (["--prompt", "a", "--cache_schedule", "0,9", "--steps", "5"], 2, "names steps [9]"),
        (
            ["--prompt", "a", "--cache_schedule", "0,1", "--steps", "2"],
            2,
            "--DC or --cache_schedule has no effect: all 2 steps",
        ),
        (["--prompt", "a", "--compare"], 2, "--compare needs an acceleration"),
        (["--prompt", "a", "--clip_model", "x"], 2, "--clip_model has no effect without --compare"),
        (["--prompt", "a", "--FA", "--compare", "--clip_model", "none"], 2, "cannot load a CLIP model from none"),
        (["--prompt", " "], 2, "--prompt is empty"),
        ([], 2, "give --prompt or --prompt_file"),
        (["--prompt_file", "missing.txt"], 2, "prompt file missing.txt: No such file"),
        (["--prompt_file", "/dev/null"], 2, "prompt file /dev/null holds no prompt"),
        (["--prompt_file", sys.executable], 2, "is not UTF-8 text"),
        (["--prompt", "a", "--model_path", "missing"], 2, "model directory missing does not exist"),
        (["--prompt", "a", "--device", "cuda:99"], 2, "cuda"),
        (["--prompt", "a", "--device", "npu", "--soc_version", "Ascend310P3"], 2, "npu"),
        (["--prompt", "a", "--device", "toaster"], 2, "toaster"),
        (["--prompt", "a", "--device", "cpu:0", "--local_rank", "1"], 2, "name different devices"),
        (["--prompt", "a", "--output_dir", "/dev/null/out"], 2, "cannot write to output directory /dev/null/out"),
        (["--prompt", "a", "--height", "80000000", "--width", "80000000"], 1, "out of memory"),
        (["--prompt", os.fsdecode(b"caf\xe9")], 2, "argument --prompt: must be UTF-8 text, and has the byte 0xe9"),
        (["--prompt", "a", "--model_path", os.fsdecode(b"caf\xe9")], 2, "argument --model_path: must be UTF-8 text"),
        (["--prompt", "a", "--output_dir", "~no-such-user/x"], 2, "argument --output_dir: '~no-such-user/x': Could"),
        (["--prompt", "a", "--steps", "1200"], 2, "--steps 1200: the model was trained with 1000"),
        (["--prompt", "a", "--steps", "1000"], 2, "999 would do"),
        (["--prompt", "a", "--steps", "1000", "--scheduler", "pndm"], 2, "999 would do"),
        (["--prompt", "a", "--negative_prompt", "b", "--guidance_scale", "1"], 2, "--negative_prompt has no effect"),
        (["--prompt", "a", "--cfg_parallel", "2"], 2, "--cfg_parallel 2 has no effect on one device"),
        (["--prompt", "a", "--graph_cache_limit", "8GiB"], 2, "--graph_cache_limit has no effect without --dynamo"),
        (["--prompt", "a", "--dynamo", "--graph_cache_limit", "big"], 2, "must be a size as 8GiB, not 'big'"),
        (["--prompt", "a", "--graph_cache", "x"], 2, "--graph_cache has no effect without --dynamo"),
        (["--prompt", "a", "--model_path", sys.executable], 2, "is a file: a folder in diffusers' layout is wanted"),
        (
            ["--prompt", "a", "--FA", "--kernels", "magic"],
            2,
            "argument --kernels: no attention kernel is called 'magic'",
        ),
        (["--prompt", "a", "--kernels", "sdpa"], 2, "has no effect without --FA"),
        (["--prompt", "a", "--TOME", "--explain"], 2, "--explain has no effect without --FA"),
        (["--prompt", "a", "--frobnicate"], 2, "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    run_sd: Callable, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    outcome = run_sd(*arguments)
    assert outcome.code == code
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("report.json"))


def test_a_local_rank_that_is_no_number_is_an_error(run_sd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "first")
    outcome = run_sd(*PROMPT)
    assert outcome.code == 2 and "--local_rank: must be a whole number, not 'first'" in outcome.err


def test_dynamo_without_a_compiler_says_so(run_sd: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    outcome = run_sd(*PROMPT, "--dynamo")
    assert outcome.code == 2 and "there is no 'no-such-compiler'" in outcome.err


def test_a_failed_run_leaves_earlier_files_alone(run_sd: Callable, tmp_path: Path, tiny_sd_dir: Path) -> None:
    assert run_sd(*PROMPT).code == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    broken = shutil.copytree(tiny_sd_dir, tmp_path / "broken")
    shutil.rmtree(broken / "vae")
    assert run_sd(*PROMPT, "--model_path", broken).code == 2
    assert (tmp_path / "out" / "report.json").read_bytes() == before


def test_the_script_starts_from_any_folder(tmp_path: Path) -> None:
    script = ROOT / "examples" / "sd2.1" / "run_sd.py"
    ended = subprocess.run([sys.executable, script, "--steps", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: argument --steps: must be 1 or more, not 0")


def test_an_unwritable_graph_cache_is_found_before_loading(tiny_sd_dir: Path) -> None:
    from runners.model_dir import check_model_dir
    from runners.stable_diffusion.pipeline import check_before_loading

    args = Namespace(dynamo=True, graph_cache=Path("/dev/null/graphs"))
    model = check_model_dir(tiny_sd_dir)
    with pytest.raises(UserError, match="cannot write to the cache of graphs /dev/null/graphs: Not a directory"):
        check_before_loading(args, model, SimpleNamespace(type="npu"), Report())


def test_the_choice_of_a_kernel_is_explained_and_may_be_narrowed(run_sd: Callable, tmp_path: Path) -> None:
    outcome = run_sd(*PROMPT, "--FA", "--kernels", "sliced", "--explain")
    assert outcome.code == 0, outcome.err
    flag = read_report(tmp_path / "out")["flags"]["FA"]
    assert flag["kernel"] == "sliced_attention" and "attentions" in flag["components"]["unet"]
    assert "not scaled_dot_product_attention: not among the kernels asked for" in outcome.out
    assert all(line in outcome.out for line in flag["explain"])


def test_a_unet_without_attention_in_its_outermost_block_is_drawn(
    run_sd: Callable, tmp_path: Path, tiny_sd: object, tiny_sd_dir: Path
) -> None:
    from diffusers import UNet2DConditionModel

    model = shutil.copytree(tiny_sd_dir, tmp_path / "model")
    blocks = {"down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3}
    blocks["up_block_types"] = ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"]
    UNet2DConditionModel.from_config({**tiny_sd.unet.config, **blocks}).save_pretrained(model / "unet")
    outcome = run_sd(*PROMPT, "--model_path", model, "--FA", "--TOME")
    assert outcome.code == 0, outcome.err
    assert "query_length=" in read_report(tmp_path / "out")["flags"]["FA"]["explain"][0]


def test_guidance_is_a_property_of_the_model_and_not_of_its_path(
    run_sd: Callable, tmp_path: Path, tiny_sd_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scale(*arguments: object) -> float:
        outcome = run_sd("--steps", 1, "--height", 64, "--width", 64, *PROMPT, *arguments)
        assert outcome.code == 0, outcome.err
        return read_report(tmp_path / "out")["settings"]["guidance_scale"]

    monkeypatch.chdir(ROOT / "examples")
    assert scale("--model_path", "sd2.1/demo_model") == 1.5
    assert scale("--model_path", "sd2.1/demo_model", "--guidance_scale", 3) == 3
    assert scale() == 7.5
    mine = shutil.copytree(tiny_sd_dir, tmp_path / "mine")
    (mine / "defaults.json").write_text('{"guidance_scale": 4}')
    assert scale("--model_path", mine) == 4
    monkeypatch.setenv("HOME", str(tmp_path))
    assert scale("--model_path=~/mine") == 4


def test_a_model_without_a_size_draws_the_size_that_is_asked_for(
    run_sd: Callable, tmp_path: Path, tiny_sd_dir: Path
) -> None:
    model = shutil.copytree(tiny_sd_dir, tmp_path / "model")
    config = json.loads((model / "unet/config.json").read_text())
    (model / "unet/config.json").write_text(json.dumps(config | {"sample_size": None}))
    outcome = run_sd(*PROMPT, "--model_path", model)
    assert outcome.code == 2 and "does not say which size it draws: give --height and --width" in outcome.err
    assert run_sd(*PROMPT, "--model_path", model, "--height", 64, "--width", 72).code == 0
    [picture] = pixels(tmp_path / "out")
    assert picture.shape == (64, 72, 3)


def test_warm_up_calls_have_no_bar_and_say_what_they_are(run_sd: Callable) -> None:
    outcome = run_sd(*PROMPT, "--warmup", 2)
    assert outcome.code == 0, outcome.err
    before, between, after = outcome.err.split("warm-up ")
    assert between.startswith("1 of 2 ...\n... took ") and after.startswith("2 of 2 ...\n... took ")
    assert "/2 [" not in before + between and after.count("0/2 [") == 1


def test_a_picture_that_the_safety_checker_took_away_is_told_from_nan(
    run_sd: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(
        StableDiffusionPipeline, "run_safety_checker", lambda self, image, device, dtype: (image * 0, [True])
    )
    outcome = run_sd(*PROMPT)
    assert outcome.code == 0 and not pixels(tmp_path / "out")[0].any()
    report = read_report(tmp_path / "out")
    assert report["images"][0]["warnings"] == report["warnings"]
    [warning] = report["warnings"]
    assert "safety checker" in warning and "NaN" not in warning


def start(tiny_sd_dir: Path, output_dir: Path, *arguments: object) -> subprocess.Popen[str]:
    options = [
        "--model_path",
        tiny_sd_dir,
        "--device",
        "cpu",
        "--height",
        64,
        "--width",
        64,
        "--output_dir",
        output_dir,
    ]
    command = [sys.executable, ROOT / "examples/sd2.1/run_sd.py", *options, *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """A shell lets what it starts in the background ignore SIGINT, tests as well."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_pictures_drawn_before_a_signal_are_there_and_reported(
    tiny_sd_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n" * 1000)
    run = start(tiny_sd_dir, tmp_path / "out", "--steps", 4, "--prompt_file", tmp_path / "prompts.txt")
    while len(list((tmp_path / "out").glob("*.png"))) < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(number)
    out, err = run.communicate()
    assert run.returncode == 128 + number
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    files = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert 2 <= len(files) < 1000 and f"{len(files)} of 1000 pictures" in out
    report = read_report(tmp_path / "out")
    assert [entry["file"] for entry in report["images"]] == files
    assert any(f"{len(files)} of 1000 pictures are drawn" in warning for warning in report["warnings"])
    assert len(pixels(tmp_path / "out")) == len(files), "each can be read"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, "report.json"}


def test_a_start_says_nothing_but_what_the_user_can_act_on(tiny_sd_dir: Path, tmp_path: Path) -> None:
    run = start(tiny_sd_dir, tmp_path, "--steps", 2, "--dtype", "float16", "--prompt", "a" * 100)
    _, err = run.communicate()
    assert run.returncode == 0, err
    lines = [
        line for line in err.replace("\r", "\n").splitlines() if line and "it/s]" not in line and "%|" not in line
    ]
    assert [line[:40] for line in lines] == [
        "warning: float16 is slow on the CPU; flo",
        "warning: a prompt of 102 tokens is cut a",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_graphs_draw_what_eager_mode_draws(run_sd: Callable, tmp_path: Path) -> None:
    outcome = run_sd(*PROMPT, "--prompt", "b", "--FA", "--TOME", "--DC", "2", "--dynamo", "--steps", 4)
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "out")
    assert report["flags"]["dynamo"] == {"text_encoder": "eager", "unet": "inductor", "vae.decoder": "eager"}
    assert report["costs"]["compile_seconds"] > 0
    eager = run_sd(
        *PROMPT, "--prompt", "b", "--FA", "--TOME", "--DC", "2", "--steps", 4, "--output_dir", tmp_path / "eager"
    )
    assert eager.code == 0, eager.err
    for ours, theirs in zip(pixels(tmp_path / "out"), pixels(tmp_path / "eager"), strict=True):
        assert np.abs(ours - theirs).max() <= 2
