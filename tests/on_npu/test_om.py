"""Offline models on the chip: OmSession, profiles and precision against numpy, and what is refused."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

from ascend.om import OmError, OmSession
from tests.on_npu import offline_models
from tests.on_npu.offline_models import FEATURES, HALF, RESULTS, WORDS, linear, random, weights_of
from tests.programs import ROOT

ON_EMULATOR = "CANN_EMULATOR_SOC" in os.environ
PROFILES = ("--input_shape=x:-1,16", "--dynamic_batch_size=1,2,4")


@pytest.fixture(scope="module")
def soc() -> str:
    return torch.npu.get_device_name(0)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, soc: str) -> Callable[..., tuple[Path, Path]]:
    """Makes an ONNX model and its OM, once for each name."""
    directory, made = tmp_path_factory.mktemp("om"), {}

    def make_one(name: str, save: Callable[[Path], Path], *options: str) -> tuple[Path, Path]:
        if name not in made:
            model = save(directory / f"{name}.onnx")
            made[name] = model, offline_models.convert(model, soc, *options)
        return made[name]

    return make_one


@pytest.fixture(scope="module")
def fixed(make: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return make("fixed", lambda path: offline_models.save_linear(path, batch=2))


@pytest.fixture(scope="module")
def batches(make: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return make("batches", offline_models.save_linear, *PROFILES)


def test_inputs_and_outputs_are_described(fixed: tuple[Path, Path]) -> None:
    with OmSession(fixed[1]) as session:
        (x,), (y,) = session.inputs, session.outputs
    assert (x.name, x.shape, x.dtype) == ("x", (2, FEATURES), np.float32)
    assert (y.name, y.shape, y.dtype) == ("y", (2, RESULTS), np.float32)


def test_a_model_computes_in_float16(fixed: tuple[Path, Path]) -> None:
    model, om = fixed
    x = random(2, FEATURES)
    with OmSession(om) as session:
        y = session.run({"x": x})["y"]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, linear(model, x), atol=HALF)
    np.testing.assert_array_equal(y, y.astype(np.float16))  # it was


def test_a_path_may_be_far_away(fixed: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "ein Ordner"
    target.mkdir()
    moved = target / "m.om"
    moved.write_bytes(fixed[1].read_bytes())
    session = OmSession(str(moved))
    moved.unlink()  # the weights are mapped, and stay
    with session:
        assert session.run({"x": random(2, FEATURES)})["y"].shape == (2, RESULTS)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_profiles_of_the_batch(batches: tuple[Path, Path], batch: int) -> None:
    model, om = batches
    x = random(batch, FEATURES)
    with OmSession(om) as session:
        assert session.inputs[0].shape == (-1, FEATURES)
        assert session.outputs[0].shape == (4, RESULTS)
        for _ in range(2):
            np.testing.assert_allclose(session.run({"x": x})["y"], linear(model, x), atol=HALF)
        other = random(3 - batch if batch < 3 else 1, FEATURES)
        np.testing.assert_allclose(session.run({"x": other})["y"], linear(model, other), atol=HALF)


def test_profiles_of_all_dimensions(make: Callable[..., tuple[Path, Path]]) -> None:
    """In the order of --input_shape, which is not that of the model."""
    model, om = make(
        "dims",
        offline_models.save_two_inputs,
        *("--input_shape=shift:-1,1,8;ids:-1,-1", "--dynamic_dims=1,1,3;2,2,5", "--input_format=ND"),
    )
    table = weights_of(model)["table"]
    with OmSession(om) as session:
        for batch, words in [(1, 3), (2, 5)]:
            ids = np.arange(batch * words).reshape(batch, words) % WORDS
            shift = random(batch, 1, RESULTS)
            rows = session.run({"ids": ids, "shift": shift})["rows"]
            np.testing.assert_allclose(rows, table[ids] + shift, atol=HALF)
        with pytest.raises(OmError, match=r"sizes in a row are \(1, 5, 1, 1, 8\)"):
            session.run({"ids": np.zeros((1, 5), np.int64), "shift": random(1, 1, RESULTS)})


def test_profiles_of_the_image(make: Callable[..., tuple[Path, Path]]) -> None:
    model, om = make(
        "images", offline_models.save_image, "--input_shape=image:1,3,-1,-1", "--dynamic_image_size=4,6;8,8"
    )
    filters = weights_of(model)["filters"][:, :, 0, 0]
    with OmSession(om) as session:
        for height, width in [(4, 6), (8, 8)]:
            image = random(1, 3, height, width)
            features = session.run({"image": image})["features"]
            np.testing.assert_allclose(features, np.einsum("oc,nchw->nohw", filters, image), atol=HALF)
        with pytest.raises(OmError, match=r"heights and widths are \[\(6, 4\)\]"):
            session.run({"image": random(1, 3, 6, 4)})


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    "option, of_operands, of_products, of_results",
    [
        ("--precision_mode=force_fp16", True, True, True),
        ("--precision_mode_v2=fp16", True, True, True),
        ("--precision_mode=allow_fp32_to_fp16", True, True, False),
        ("--precision_mode=allow_mix_precision", True, True, False),
        ("--precision_mode_v2=mixed_float16", True, True, False),
        ("--precision_mode=force_fp32", True, False, False),
        ("--precision_mode_v2=cube_fp16in_fp32out", True, False, False),
        ("--precision_mode=must_keep_origin_dtype", False, False, False),
        ("--precision_mode_v2=origin", False, False, False),
    ],
)
def test_precision_modes(
    tmp_path: Path, soc: str, option: str, of_operands: bool, of_products: bool, of_results: bool
) -> None:
    """What is rounded to float16; inputs and outputs are float32 in all modes. 310P has no float32 products."""
    model = offline_models.save_linear(tmp_path / "m.onnx", batch=2)
    x, (weight, bias) = random(2, FEATURES), weights_of(model).values()
    with OmSession(offline_models.convert(model, soc, option)) as session:
        y = session.run({"x": x})["y"]
    product = half(x) @ half(weight) if of_operands or soc == "Ascend310P3" else x @ weight
    product = half(product) if of_products else product
    expected = np.maximum(half(product + half(bias)) if of_results else product + bias, 0)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=1e-3)  # a unit of float16: sums have an order of their own
    assert np.median(np.abs(y - expected)[expected > 0]) < 1e-6
    if of_operands or soc == "Ascend310P3":
        assert np.median(np.abs(y - linear(model, x))[expected > 0]) > 1e-5


def test_a_bfloat16_mode(tmp_path: Path, soc: str) -> None:
    if soc == "Ascend310P3":
        pytest.skip("310P has no bfloat16; test_atc.py has the refusal")
    model = offline_models.save_linear(tmp_path / "m.onnx", batch=2)
    x = random(2, FEATURES)
    with OmSession(offline_models.convert(model, soc, "--precision_mode_v2=mixed_bfloat16")) as session:
        error = np.abs(session.run({"x": x})["y"] - linear(model, x)).max()
    assert 1e-4 < error < 4e-2


def test_output_type_and_half_inputs(tmp_path: Path, soc: str) -> None:
    model = offline_models.save_linear(tmp_path / "m.onnx", batch=2)
    om = offline_models.convert(model, soc, "--output_type=FP16", "--input_fp16_nodes=x")
    x = random(2, FEATURES).astype(np.float16)
    with OmSession(om) as session:
        y = session.run({"x": x})["y"]
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, linear(model, x), atol=HALF)


def test_a_float16_model_keeps_its_dtype(tmp_path: Path, soc: str) -> None:
    model = offline_models.save_linear(tmp_path / "m.onnx", batch=2, dtype=TensorProto.FLOAT16)
    x = random(2, FEATURES).astype(np.float16)
    with OmSession(offline_models.convert(model, soc)) as session:
        y = session.run({"x": x})["y"]
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, linear(model, x), atol=HALF)


def test_two_sessions_and_two_threads(fixed: tuple[Path, Path]) -> None:
    model, om = fixed
    x = random(2, FEATURES)
    results = []

    def work() -> None:
        with OmSession(om) as session:
            results.extend(session.run({"x": x})["y"] for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 10
    for y in results:
        np.testing.assert_allclose(y, linear(model, x), atol=HALF)


def test_threads_take_turns_and_each_gets_its_own_result(batches: tuple[Path, Path]) -> None:
    """One session has one memory for inputs and outputs."""
    model, om = batches
    wrong: list[int] = []

    def work(session: OmSession, batch: int) -> None:
        x = random(batch, FEATURES)
        expected = linear(model, x)
        for _ in range(20):
            y = session.run({"x": x})["y"]
            if y.shape != expected.shape or np.abs(y - expected).max() > HALF:
                wrong.append(batch)

    with OmSession(om) as session:
        threads = [threading.Thread(target=work, args=(session, batch)) for batch in (1, 2, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_session_that_is_closed_says_so(fixed: tuple[Path, Path]) -> None:
    session, stream = OmSession(fixed[1]), torch.npu.Stream()
    run = session.submit({"x": random(2, FEATURES)}, stream.npu_stream)
    session.close()
    for use in (run.result, lambda: session.run({"x": random(2, FEATURES)})):
        with pytest.raises(OmError, match="the session is closed"):
            use()
    session.close()


def test_beside_torch_on_a_stream(fixed: tuple[Path, Path]) -> None:
    model, om = fixed
    x = random(2, FEATURES)
    stream = torch.npu.Stream()
    with OmSession(om) as session:
        run = session.submit({"x": x}, stream.npu_stream)
        with pytest.raises(OmError, match="fetch the result of the run before"):
            session.run({"x": x})
        np.testing.assert_allclose(run.result()["y"], linear(model, x), atol=HALF)
        with pytest.raises(OmError, match="fetched already"):
            run.result()
    assert torch.ones(3, device="npu").sum().item() == 3


def test_a_closed_session_leaves_no_memory(batches: tuple[Path, Path]) -> None:
    free = torch.npu.mem_get_info()[0]
    for _ in range(3):
        with OmSession(batches[1]) as session:
            assert torch.npu.mem_get_info()[0] < free
            session.run({"x": random(2, FEATURES)})
        session.close()
    assert torch.npu.mem_get_info()[0] == free


@pytest.mark.parametrize("runs", [False, True], ids=["idle", "running"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in a thread without a context"])
def test_a_session_that_is_dropped_leaves_no_memory_and_says_so(
    batches: tuple[Path, Path], runs: bool, elsewhere: bool
) -> None:
    """Also behind a run that nobody waited for."""
    free, stream = torch.npu.mem_get_info()[0], torch.npu.Stream()
    sessions = [OmSession(batches[1])]
    assert torch.npu.mem_get_info()[0] < free
    if runs:
        sessions[0].submit({"x": random(2, FEATURES)}, stream.npu_stream)

    def drop() -> None:
        sessions.clear()
        gc.collect()  # a run and its session know each other

    with pytest.warns(ResourceWarning, match=rf"the offline model {batches[1]} was not closed"):
        if elsewhere:
            thread = threading.Thread(target=drop)
            thread.start()
            thread.join()
        else:
            drop()
    assert torch.npu.mem_get_info()[0] == free
    assert torch.ones(3, device="npu").sum().item() == 3  # in its own context


def test_a_session_that_is_closed_does_not_say_so(batches: tuple[Path, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with OmSession(batches[1]) as session:
            session.run({"x": random(2, FEATURES)})
        del session
        gc.collect()


@pytest.mark.parametrize(
    "feeds, message",
    [
        ({}, "the input x is missing"),
        ({"x": np.zeros((2, 16), np.float32), "z": np.zeros(1)}, r"no inputs \['z'\]"),
        ({"x": np.zeros((2, 16))}, "is float64, and the model takes float32"),
        ({"x": np.zeros((2, 15), np.float32)}, r"has the shape \(2, 15\), and the model takes \(-1, 16\)"),
        ({"x": np.zeros((16,), np.float32)}, r"has the shape \(16,\)"),
        ({"x": np.zeros((3, 16), np.float32)}, r"batches are \[3\], and the model has profiles for \(1, 2, 4\)"),
    ],
)
def test_wrong_feeds(batches: tuple[Path, Path], feeds: dict[str, np.ndarray], message: str) -> None:
    with OmSession(batches[1]) as session:
        with pytest.raises(OmError, match=message):
            session.run(feeds)
        session.run({"x": random(1, FEATURES)})  # and goes on


def test_files_that_are_no_models(fixed: tuple[Path, Path], tmp_path: Path) -> None:
    whole = fixed[1].read_bytes()
    middle = len(whole) - 40
    damaged = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    contents = {
        "truncated": whole[:-1],
        "damaged": damaged,
        "an offline model of CANN's own atc": b"IMOD" + bytes(300),
        "no offline model": b"",
    }
    free = torch.npu.mem_get_info()[0]
    for i, (message, content) in enumerate(contents.items()):
        path = tmp_path / f"{i}.om"
        path.write_bytes(content)
        with pytest.raises(OmError, match=message if ON_EMULATOR else "aclmdlLoadFromFile failed"):
            OmSession(path)
    with pytest.raises(OmError, match="aclmdlLoadFromFile failed with 145002"):
        OmSession(tmp_path / "missing.om")
    with pytest.raises(OmError, match="aclrtSetDevice failed"):
        OmSession(fixed[1], device_id=63)
    assert torch.npu.mem_get_info()[0] == free


@pytest.mark.skipif(not ON_EMULATOR, reason="needs the atc of another chip")
def test_a_model_of_another_chip(tmp_path: Path, soc: str) -> None:
    model, other = offline_models.save_linear(tmp_path / "m.onnx", batch=1), offline_models.OTHER[soc]
    with pytest.raises(OmError, match=f"converted for {other}, and this chip is {soc}"):
        OmSession(offline_models.convert_on(other, model))


PROGRAM = """
import sys
import numpy as np
from ascend.om import OmSession
with OmSession(sys.argv[1]) as session:
    y = session.run({"x": np.ones((2, 16), np.float32)})["y"]
assert y.shape == (2, 8)
assert not {"torch", "torch_npu"} & set(sys.modules)
print("done")
"""


UNCLOSED = """
import sys
import numpy as np
MORE
from ascend.om import OmSession
session = OmSession(sys.argv[1])
feeds = {"x": np.ones((2, 16), np.float32)}
assert session.run(feeds)["y"].shape == (2, 8)
if "torch" in sys.modules:
    session.submit(feeds, torch.npu.current_stream().npu_stream)
    assert torch.ones(3, device="npu").sum().item() == 3
print("done")
"""


@pytest.mark.parametrize("more", ["", "import torch, torch_npu"], ids=["alone", "beside torch"])
@pytest.mark.parametrize("after", ["", "session.itself = session"], ids=["", "in a circle"])
def test_a_process_that_ends_without_closing(fixed: tuple[Path, Path], more: str, after: str) -> None:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", UNCLOSED.replace("MORE", more) + after]
    done = subprocess.run([*command, fixed[1]], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "Exception" not in done.stderr and "ResourceWarning" not in done.stderr


def test_a_process_without_torch(fixed: tuple[Path, Path]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(fixed[1])], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
