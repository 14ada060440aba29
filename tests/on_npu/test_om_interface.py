"""CANN's C functions of offline models, where `ascend.om` does not call them or not so."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.on_npu import offline_models
from tests.on_npu.offline_models import FEATURES, HALF, RESULTS, linear


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and its OM for batches of 2."""
    model = offline_models.save_linear(tmp_path_factory.mktemp("om") / "fixed.onnx", batch=2)
    return model, offline_models.convert(model, torch.npu.get_device_name(0))


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and its OM for batches of 1, 2 and 4."""
    model = offline_models.save_linear(tmp_path_factory.mktemp("om") / "batches.onnx")
    profiles = ("--input_shape=x:-1,16", "--dynamic_batch_size=1,2,4")
    return model, offline_models.convert(model, torch.npu.get_device_name(0), *profiles)


@pytest.fixture
def acl() -> ctypes.CDLL:
    library = ctypes.CDLL("libascendcl.so")
    for name in ("aclmdlCreateDesc", "aclmdlCreateDataset", "aclCreateDataBuffer"):
        getattr(library, name).restype = ctypes.c_void_p
    library.aclmdlGetInputSizeByIndex.restype = ctypes.c_size_t
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library


class Raw:
    """A model by the C functions, with torch's memory."""

    def __init__(self, acl: ctypes.CDLL, om: Path) -> None:
        self.acl, self.id, self.tensors = acl, ctypes.c_uint32(), []
        assert acl.aclmdlLoadFromFile(os.fsencode(om), ctypes.byref(self.id)) == 0
        self.desc = ctypes.c_void_p(acl.aclmdlCreateDesc())
        assert acl.aclmdlGetDesc(self.desc, self.id) == 0

    def dataset(self, *tensors: torch.Tensor) -> ctypes.c_void_p:
        self.tensors += tensors
        dataset = ctypes.c_void_p(self.acl.aclmdlCreateDataset())
        for tensor in tensors:
            size = ctypes.c_size_t(tensor.nbytes)
            buffer = self.acl.aclCreateDataBuffer(ctypes.c_void_p(tensor.data_ptr()), size)
            assert self.acl.aclmdlAddDatasetBuffer(dataset, ctypes.c_void_p(buffer)) == 0
        return dataset

    def message(self) -> str:
        return (self.acl.aclGetRecentErrMsg() or b"").decode()


def test_without_a_choice_the_largest_profile_runs(acl: ctypes.CDLL, batches: tuple[Path, Path]) -> None:
    model, om = batches
    raw = Raw(acl, om)
    assert acl.aclmdlGetNumInputs(raw.desc) == 2
    index = ctypes.c_size_t()
    assert acl.aclmdlGetInputIndexByName(raw.desc, b"ascend_mbatch_shape_data", ctypes.byref(index)) == 0
    assert index.value == 1
    assert acl.aclmdlGetInputSizeByIndex(raw.desc, ctypes.c_size_t(0)) == 4 * FEATURES * 4
    x, y = torch.randn(4, FEATURES).npu(), torch.zeros(4, RESULTS, device="npu")
    choice = torch.zeros(1, dtype=torch.int32, device="npu")
    inputs, outputs = raw.dataset(x, choice), raw.dataset(y)
    torch.npu.synchronize()
    assert acl.aclmdlExecute(raw.id, inputs, outputs) == 0
    np.testing.assert_allclose(y.cpu(), linear(model, x.cpu().numpy()), atol=HALF)
    assert acl.aclmdlSetDynamicBatchSize(raw.id, inputs, index, ctypes.c_uint64(3)) == 145013
    assert "3 is no profile" in raw.message()
    assert acl.aclmdlSetDynamicHWSize(raw.id, inputs, index, ctypes.c_uint64(1), ctypes.c_uint64(1)) == 145013
    assert acl.aclmdlSetDynamicBatchSize(raw.id, inputs, index, ctypes.c_uint64(2)) == 0
    assert choice.item() == 2
    assert acl.aclmdlUnload(raw.id) == 0
    assert acl.aclmdlUnload(raw.id) == 145003
    assert "there is no model" in raw.message()


def test_buffers_and_streams_are_checked(acl: ctypes.CDLL, fixed: tuple[Path, Path]) -> None:
    raw = Raw(acl, fixed[1])
    x, y = torch.zeros(2, FEATURES, device="npu"), torch.zeros(2, RESULTS, device="npu")
    inputs, outputs = raw.dataset(x), raw.dataset(y)
    torch.npu.synchronize()
    assert acl.aclmdlExecute(raw.id, raw.dataset(x, x), outputs) == 145000
    assert "there are 2 inputs, and the model has 1" in raw.message()
    assert acl.aclmdlExecute(raw.id, raw.dataset(x[:1]), outputs) == 145000
    assert "input x has 64 bytes, and the model needs 128" in raw.message()
    assert acl.aclmdlExecute(raw.id, raw.dataset(torch.zeros(2, FEATURES)), outputs) == 145000
    assert "is not in the memory of device 0" in raw.message()
    first, second = (ctypes.c_void_p(torch.npu.Stream().npu_stream) for _ in range(2))
    assert acl.aclmdlExecuteAsync(raw.id, inputs, outputs, first) == 0
    assert acl.aclmdlExecuteAsync(raw.id, inputs, outputs, first) == 0
    assert acl.aclmdlExecuteAsync(raw.id, inputs, outputs, second) == 145000
    assert "may still run on another stream" in raw.message()
    assert acl.aclrtSynchronizeStream(first) == 0
    assert acl.aclmdlExecuteAsync(raw.id, inputs, outputs, second) == 0
    assert acl.aclrtSynchronizeStream(second) == 0
    assert acl.aclmdlUnload(raw.id) == 0


def test_memory_of_the_program(acl: ctypes.CDLL, fixed: tuple[Path, Path]) -> None:
    model, om = fixed
    work, weights = ctypes.c_size_t(), ctypes.c_size_t()
    assert acl.aclmdlQuerySize(os.fsencode(om), ctypes.byref(work), ctypes.byref(weights)) == 0
    places = [torch.empty(size.value, dtype=torch.uint8, device="npu") for size in (work, weights)]
    arguments = [(ctypes.c_void_p(place.data_ptr()), ctypes.c_size_t(place.nbytes)) for place in places]
    model_id = ctypes.c_uint32()
    load = acl.aclmdlLoadFromFileWithMem
    small = ctypes.c_size_t(1)
    assert load(os.fsencode(om), ctypes.byref(model_id), arguments[0][0], small, *arguments[1]) == 145000
    assert load(os.fsencode(om), ctypes.byref(model_id), *arguments[0], *arguments[1]) == 0
    raw = Raw(acl, om)
    x, y = torch.randn(2, FEATURES).npu(), torch.zeros(2, RESULTS, device="npu")
    torch.npu.synchronize()
    assert acl.aclmdlExecute(model_id, raw.dataset(x), raw.dataset(y)) == 0
    np.testing.assert_allclose(y.cpu(), linear(model, x.cpu().numpy()), atol=HALF)
    assert acl.aclmdlUnload(model_id) == acl.aclmdlUnload(raw.id) == 0
