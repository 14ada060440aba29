"""Offline models (OM files) on Ascend NPUs, by CANN's C interface and numpy; torch is not needed.

    with OmSession("clip_vision.om") as session:
        outputs = session.run({"pixel_values": images})

An OM is made for one chip by CANN's `atc`. The weights are read by CANN from the file; Python never holds them. It
runs beside torch_npu in one process: whoever comes second is told that CANN is initialised, and neither ends it.

The functions, and what they do with profiles of shapes, are in CANN's documentation of the aclmdl functions.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from ctypes import byref, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from ascend.acl import Acl, Batches, Dims, OmError, Sizes, load_acl

_HUGE_PAGES_FIRST, _TO_DEVICE, _TO_HOST = 0, 1, 2
_SHAPE_INPUT = b"ascend_mbatch_shape_data"  # which a model with profiles has in addition to its own
_DTYPES = {
    **{0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16"},
    **{8: "uint32", 9: "int64", 10: "uint64", 11: "float64", 12: "bool"},
}


@dataclass(frozen=True)
class OmTensor:
    """An input or output: `shape` has -1 where the profiles differ."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _Profiles:
    """The shapes that a model takes, and how one of them is chosen."""

    def __init__(self, acl: Acl, model: int, desc: int, inputs: tuple[OmTensor, ...]) -> None:
        self._acl, self._model, self._inputs = acl, model, inputs
        batches, sizes, count = Batches(), Sizes(), c_size_t()
        acl.aclmdlGetDynamicBatch(desc, byref(batches))
        acl.aclmdlGetDynamicHW(desc, c_size_t(-1), byref(sizes))
        acl.aclmdlGetInputDynamicGearCount(desc, c_size_t(-1), byref(count))
        gears = (Dims * count.value)()
        if count.value:
            acl.aclmdlGetInputDynamicDims(desc, c_size_t(-1), gears, count.value)
        self.batches = tuple(batches.batches[: batches.count])
        self.image_sizes = tuple((size[0], size[1]) for size in sizes.sizes[: sizes.count])
        self.dims = tuple(gear.shape() for gear in gears)

    def choose(self, dataset: int, shapes: list[tuple[int, ...]]) -> None:
        """Sets the profile of these shapes, which fit the inputs but for what is -1 there.

        Raises:
            OmError: there is no such profile.
        """
        index = len(shapes)
        wanted = [
            size
            for tensor, shape in zip(self._inputs, shapes, strict=True)
            for size, declared in zip(shape, tensor.shape, strict=True)
            if declared == -1
        ]
        if self.batches:
            if len(set(wanted)) != 1 or wanted[0] not in self.batches:
                raise OmError(f"the inputs' batches are {wanted}, and the model has profiles for {self.batches}")
            self._acl.aclmdlSetDynamicBatchSize(self._model, dataset, index, wanted[0])
        elif self.image_sizes:
            pairs = set(zip(wanted[::2], wanted[1::2], strict=True))
            if len(pairs) != 1 or not pairs <= set(self.image_sizes):
                raise OmError(f"the heights and widths are {sorted(pairs)}, the model has {self.image_sizes}")
            self._acl.aclmdlSetDynamicHWSize(self._model, dataset, index, *pairs.pop())
        elif self.dims:
            row = tuple(size for shape in shapes for size in shape)
            if row not in self.dims:
                raise OmError(f"the inputs' sizes in a row are {row}, and the model has profiles for {self.dims}")
            dims = Dims(count=len(row))
            dims.sizes[: len(row)] = row
            self._acl.aclmdlSetInputDynamicDims(self._model, dataset, index, byref(dims))


class Held:
    """What a session holds on its device, until the run that was launched is done."""

    def __init__(self, acl: Acl, path: str) -> None:
        self.acl, self.path = acl, path
        self.context = 0
        self.stack = ExitStack()
        self.stream: int | None = None  # of a run whose result has not been fetched

    def free(self) -> None:
        with self.acl.in_context(self.context):
            try:
                if self.stream is not None:
                    self.acl.aclrtSynchronizeStream(self.stream)
                    self.stream = None
            finally:
                self.stack.close()

    def free_unclosed(self) -> None:
        self.free()
        warnings.warn(f"the offline model {self.path} was not closed", ResourceWarning, stacklevel=2)


class OmRun:
    """A run that was launched; `result` waits for it."""

    def __init__(self, session: OmSession, stream: int) -> None:
        self._session, self._stream = session, stream

    def result(self) -> dict[str, np.ndarray]:
        """Waits for the stream, and returns the outputs by name. Once a run."""
        return self._session._finish(self, self._stream)


class OmSession:
    """One offline model on one device, with memory for its inputs and outputs there.

    A session has one run at a time, for which threads wait; load the file again for runs beside each other. One that
    is dropped without `close` gives back what it holds, with a ResourceWarning; at the end of the process nothing is
    done, as CANN may have ended before.

    Attributes:
        inputs, outputs: what the model takes and gives. Outputs are called as in the ONNX model ("embeds" of CANN's
            "node:index:embeds"), or as CANN calls them where that is not unique.

    Args:
        path: the OM file.
        device_id: the device, as this process counts.

    Raises:
        OmError: the library or the device is missing, the file is truncated, damaged, or for another chip.
    """

    def __init__(self, path: str | os.PathLike[str], device_id: int = 0) -> None:
        self._acl = load_acl()
        self._held = Held(self._acl, os.fspath(path))
        self._closing = self._held.stack
        self._pending: OmRun | None = None
        self._turn = threading.RLock()  # its memory is that of one run
        previous = self._acl.context()
        try:
            self._acl.aclrtSetDevice(device_id)
            self._held.context = self._acl.context() or 0
            self._load(os.fsencode(path))
        except BaseException:
            self._closing.close()
            raise
        finally:
            if previous is not None:
                self._acl.aclrtSetCurrentContext(previous)
        self._dropped = weakref.finalize(self, self._held.free_unclosed)
        self._dropped.atexit = False

    def _load(self, path: bytes) -> None:
        model = c_uint32()
        self._acl.aclmdlLoadFromFile(path, byref(model))
        self._model = model.value
        self._closing.callback(self._acl.aclmdlUnload, self._model)
        self._desc = self._acl.aclmdlCreateDesc()
        self._closing.callback(self._acl.aclmdlDestroyDesc, self._desc)
        self._acl.aclmdlGetDesc(self._desc, self._model)
        count = self._acl.aclmdlGetNumInputs(self._desc)
        has_profiles = count > 0 and self._acl.aclmdlGetInputNameByIndex(self._desc, count - 1) == _SHAPE_INPUT
        self.inputs = tuple(self._describe("Input", i) for i in range(count - has_profiles))
        outputs = [self._describe("Output", i) for i in range(self._acl.aclmdlGetNumOutputs(self._desc))]
        short = [tensor.name.rpartition(":")[2] for tensor in outputs]
        if len(set(short)) == len(short):
            outputs = [OmTensor(name, tensor.shape, tensor.dtype) for name, tensor in zip(short, outputs, strict=True)]
        self.outputs = tuple(outputs)
        self._profiles = _Profiles(self._acl, self._model, self._desc, self.inputs)
        self._feeds, self._feed_memory = self._dataset("Input", count)
        self._results, self._result_memory = self._dataset("Output", len(outputs))

    def _describe(self, kind: str, index: int) -> OmTensor:
        dims = Dims()
        name = getattr(self._acl, f"aclmdlGet{kind}NameByIndex")(self._desc, index).decode()
        getattr(self._acl, "aclmdlGetInputDimsV2" if kind == "Input" else "aclmdlGetOutputDims")(
            self._desc, index, byref(dims)
        )
        code = getattr(self._acl, f"aclmdlGet{kind}DataType")(self._desc, index)
        if code not in _DTYPES:
            raise OmError(f"{kind.lower()} {name} has CANN's data type {code}, which numpy does not have")
        return OmTensor(name, dims.shape(), np.dtype(_DTYPES[code]))

    def _dataset(self, kind: str, count: int) -> tuple[int, list[tuple[int, int]]]:
        """A dataset with a buffer for each input or output, and the address and size of each."""
        dataset = self._acl.aclmdlCreateDataset()
        self._closing.callback(self._acl.aclmdlDestroyDataset, dataset)
        memory = []
        for index in range(count):
            size = getattr(self._acl, f"aclmdlGet{kind}SizeByIndex")(self._desc, index)
            if size == 0:
                raise OmError(f"{kind.lower()} {index} has an unlimited shape: convert the model with profiles")
            address = c_void_p()
            self._acl.aclrtMalloc(byref(address), size, _HUGE_PAGES_FIRST)
            self._closing.callback(self._acl.aclrtFree, address.value)
            buffer = self._acl.aclCreateDataBuffer(address, size)
            self._closing.callback(self._acl.aclDestroyDataBuffer, buffer)
            self._acl.aclmdlAddDatasetBuffer(dataset, buffer)
            memory.append((address.value or 0, size))
        return dataset, memory

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        """It is the calling thread's turn, whose context is the model's, and its own again afterwards."""
        with self._turn:
            if not self._dropped.alive:
                raise OmError("the session is closed")
            with self._acl.in_context(self._held.context):
                yield

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the model and waits for it.

        Args:
            feeds: an array for each input, by name, of exactly its dtype and of a shape that the model takes.

        Returns:
            The outputs by name, in the shapes of this run.

        Raises:
            OmError: feeds that the model does not take, or a run that fails.
        """
        with self._in_context():
            self._write(feeds)
            self._acl.aclmdlExecute(self._model, self._feeds, self._results)
            return self._read()

    def submit(self, feeds: Mapping[str, np.ndarray], stream: int) -> OmRun:
        """The same, behind what is on `stream` (an aclrtStream, `torch.npu.Stream.npu_stream`); does not wait.

        Raises:
            OmError: as `run`, or an earlier run's result has not been fetched.
        """
        with self._in_context():
            self._write(feeds)
            self._acl.aclmdlExecuteAsync(self._model, self._feeds, self._results, stream)
            self._pending, self._held.stream = OmRun(self, stream), stream
            return self._pending

    def _finish(self, run: OmRun, stream: int) -> dict[str, np.ndarray]:
        with self._in_context():
            if run is not self._pending:
                raise OmError("this run's result has been fetched already")
            self._pending = None
            self._acl.aclrtSynchronizeStream(stream)
            self._held.stream = None
            return self._read()

    def _write(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Chooses the profile and copies the inputs to the device."""
        if self._pending is not None:
            raise OmError("fetch the result of the run before this one first: it uses the same memory")
        arrays = [self._check(tensor, feeds) for tensor in self.inputs]
        if len(feeds) != len(arrays):
            unknown = sorted(set(feeds) - {tensor.name for tensor in self.inputs})
            raise OmError(f"the model has no inputs {unknown}; it has {[tensor.name for tensor in self.inputs]}")
        self._profiles.choose(self._feeds, [array.shape for array in arrays])
        for array, (address, size) in zip(arrays, self._feed_memory, strict=False):  # the last may be the profile's
            if array.nbytes:
                self._acl.aclrtMemcpy(address, size, array.ctypes.data, array.nbytes, _TO_DEVICE)

    @staticmethod
    def _check(tensor: OmTensor, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        if tensor.name not in feeds:
            raise OmError(f"the input {tensor.name} is missing; there are {sorted(feeds)}")
        array = np.asarray(feeds[tensor.name])
        if array.dtype != tensor.dtype:
            raise OmError(f"the input {tensor.name} is {array.dtype}, and the model takes {tensor.dtype}")
        fits = len(array.shape) == len(tensor.shape) and all(
            declared in (-1, size) for size, declared in zip(array.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise OmError(f"the input {tensor.name} has the shape {array.shape}, and the model takes {tensor.shape}")
        return np.asarray(array, order="C")  # ascontiguousarray would make a vector of a scalar

    def _read(self) -> dict[str, np.ndarray]:
        outputs = {}
        for index, (tensor, (address, _)) in enumerate(zip(self.outputs, self._result_memory, strict=True)):
            dims = Dims()
            self._acl.aclmdlGetCurOutputDims(self._desc, index, byref(dims))
            array = np.empty(dims.shape(), tensor.dtype)
            if array.nbytes:
                self._acl.aclrtMemcpy(array.ctypes.data, array.nbytes, address, array.nbytes, _TO_HOST)
            outputs[tensor.name] = array
        return outputs

    def close(self) -> None:
        """Frees what the session has on the device, when a run that was launched is done. Twice is once."""
        with self._turn:
            if self._dropped.detach():
                self._pending = None
                self._held.free()

    def __enter__(self) -> OmSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
