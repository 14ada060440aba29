"""Offline models (OM files) on Ascend NPUs, by CANN's C interface and numpy; torch is not needed.

    with OmSession("clip_vision.om") as session:
        outputs = session.run({"pixel_values": images})

An OM is made for one chip by CANN's `atc`. The weights are read by CANN from the file; Python never holds them. It
runs beside torch_npu in one process: whoever comes second is told that CANN is initialised, and neither ends it.

The functions, and what they do with profiles of shapes, are in CANN's documentation of the aclmdl functions.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

_LIBRARY = "libascendcl.so"
_ALREADY_INITIALISED = 100002
_NO_CONTEXT = 107002
_HUGE_PAGES_FIRST, _TO_DEVICE, _TO_HOST = 0, 1, 2
_SHAPE_INPUT = b"ascend_mbatch_shape_data"  # which a model with profiles has in addition to its own
_DTYPES = {
    **{0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16"},
    **{8: "uint32", 9: "int64", 10: "uint64", 11: "float64", 12: "bool"},
}


class OmError(RuntimeError):
    """An offline model that cannot be loaded or run, or feeds that are not what it takes."""


class _Dims(ctypes.Structure):  # aclmdlIODims
    _fields_ = (("name", c_char * 128), ("count", c_size_t), ("sizes", c_int64 * 128))

    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[: self.count])


class _Batches(ctypes.Structure):  # aclmdlBatch
    _fields_ = (("count", c_size_t), ("batches", c_uint64 * 128))


class _Sizes(ctypes.Structure):  # aclmdlHW
    _fields_ = (("count", c_size_t), ("sizes", (c_uint64 * 2) * 128))


# name: (result, *arguments); a result of c_int is an error code.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "aclInit": (c_int, c_char_p),
    "aclGetRecentErrMsg": (c_char_p,),
    "aclrtSetDevice": (c_int, c_int32),
    "aclrtGetCurrentContext": (c_int, POINTER(c_void_p)),
    "aclrtSetCurrentContext": (c_int, c_void_p),
    "aclrtMalloc": (c_int, POINTER(c_void_p), c_size_t, c_int),
    "aclrtFree": (c_int, c_void_p),
    "aclrtMemcpy": (c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_int),
    "aclrtSynchronizeStream": (c_int, c_void_p),
    "aclmdlLoadFromFile": (c_int, c_char_p, POINTER(c_uint32)),
    "aclmdlUnload": (c_int, c_uint32),
    "aclmdlCreateDesc": (c_void_p,),
    "aclmdlDestroyDesc": (c_int, c_void_p),
    "aclmdlGetDesc": (c_int, c_void_p, c_uint32),
    "aclmdlGetNumInputs": (c_size_t, c_void_p),
    "aclmdlGetNumOutputs": (c_size_t, c_void_p),
    "aclmdlGetInputNameByIndex": (c_char_p, c_void_p, c_size_t),
    "aclmdlGetOutputNameByIndex": (c_char_p, c_void_p, c_size_t),
    "aclmdlGetInputDataType": (c_int32, c_void_p, c_size_t),
    "aclmdlGetOutputDataType": (c_int32, c_void_p, c_size_t),
    "aclmdlGetInputSizeByIndex": (c_size_t, c_void_p, c_size_t),
    "aclmdlGetOutputSizeByIndex": (c_size_t, c_void_p, c_size_t),
    "aclmdlGetInputDimsV2": (c_int, c_void_p, c_size_t, POINTER(_Dims)),
    "aclmdlGetOutputDims": (c_int, c_void_p, c_size_t, POINTER(_Dims)),
    "aclmdlGetCurOutputDims": (c_int, c_void_p, c_size_t, POINTER(_Dims)),
    "aclmdlGetDynamicBatch": (c_int, c_void_p, POINTER(_Batches)),
    "aclmdlGetDynamicHW": (c_int, c_void_p, c_size_t, POINTER(_Sizes)),
    "aclmdlGetInputDynamicGearCount": (c_int, c_void_p, c_size_t, POINTER(c_size_t)),
    "aclmdlGetInputDynamicDims": (c_int, c_void_p, c_size_t, POINTER(_Dims), c_size_t),
    "aclmdlSetDynamicBatchSize": (c_int, c_uint32, c_void_p, c_size_t, c_uint64),
    "aclmdlSetDynamicHWSize": (c_int, c_uint32, c_void_p, c_size_t, c_uint64, c_uint64),
    "aclmdlSetInputDynamicDims": (c_int, c_uint32, c_void_p, c_size_t, POINTER(_Dims)),
    "aclmdlCreateDataset": (c_void_p,),
    "aclmdlDestroyDataset": (c_int, c_void_p),
    "aclmdlAddDatasetBuffer": (c_int, c_void_p, c_void_p),
    "aclCreateDataBuffer": (c_void_p, c_void_p, c_size_t),
    "aclDestroyDataBuffer": (c_int, c_void_p),
    "aclmdlExecute": (c_int, c_uint32, c_void_p, c_void_p),
    "aclmdlExecuteAsync": (c_int, c_uint32, c_void_p, c_void_p, c_void_p),
}
_NOT_CHECKED = {"aclmdlGetInputDataType", "aclmdlGetOutputDataType"}


class _Acl:
    """CANN's functions by name; one that returns an error code raises OmError instead."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise OmError(
                f"{_LIBRARY} is not there ({error}): source CANN's set_env.sh, or run `python -m emulator run -- ...`"
            ) from None
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        code = self._library.aclInit(None)
        if code not in (0, _ALREADY_INITIALISED):
            raise self._error("aclInit", code)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if _FUNCTIONS[name][0] is not c_int or name in _NOT_CHECKED:
            return function

        def checked(*arguments: object) -> None:
            code = function(*arguments)
            if code != 0:
                raise self._error(name, code)

        return checked

    def _error(self, name: str, code: int) -> OmError:
        message = self._library.aclGetRecentErrMsg()
        return OmError(f"{name} failed with {code}: {message.decode(errors='replace') if message else 'no message'}")

    def context(self) -> int | None:
        """The calling thread's context; None where it has none."""
        context = c_void_p()
        code = self._library.aclrtGetCurrentContext(byref(context))
        if code not in (0, _NO_CONTEXT):
            raise self._error("aclrtGetCurrentContext", code)
        return context.value if code == 0 else None


@cache
def _acl() -> _Acl:
    return _Acl()


@dataclass(frozen=True)
class OmTensor:
    """An input or output: `shape` has -1 where the profiles differ."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _Profiles:
    """The shapes that a model takes, and how one of them is chosen."""

    def __init__(self, acl: _Acl, model: int, desc: int, inputs: tuple[OmTensor, ...]) -> None:
        self._acl, self._model, self._inputs = acl, model, inputs
        batches, sizes, count = _Batches(), _Sizes(), c_size_t()
        acl.aclmdlGetDynamicBatch(desc, byref(batches))
        acl.aclmdlGetDynamicHW(desc, c_size_t(-1), byref(sizes))
        acl.aclmdlGetInputDynamicGearCount(desc, c_size_t(-1), byref(count))
        gears = (_Dims * count.value)()
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
            dims = _Dims(count=len(row))
            dims.sizes[: len(row)] = row
            self._acl.aclmdlSetInputDynamicDims(self._model, dataset, index, byref(dims))


class OmRun:
    """A run that was launched; `result` waits for it."""

    def __init__(self, session: OmSession, stream: int) -> None:
        self._session, self._stream = session, stream

    def result(self) -> dict[str, np.ndarray]:
        """Waits for the stream, and returns the outputs by name. Once a run."""
        return self._session._finish(self, self._stream)


class OmSession:
    """One offline model on one device, with memory for its inputs and outputs there.

    A session has one run at a time, for which threads wait; load the file again for runs beside each other.

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
        self._acl = _acl()
        self._closing = ExitStack()
        self._pending: OmRun | None = None
        self._turn = threading.RLock()  # its memory is that of one run
        self._is_closed = False
        previous = self._acl.context()
        try:
            self._acl.aclrtSetDevice(device_id)
            self._context = self._acl.context()
            self._load(os.fsencode(path))
        except BaseException:
            self._closing.close()
            raise
        finally:
            if previous is not None:
                self._acl.aclrtSetCurrentContext(previous)

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
        dims = _Dims()
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
            if self._is_closed:
                raise OmError("the session is closed")
            previous = self._acl.context()
            self._acl.aclrtSetCurrentContext(self._context)
            try:
                yield
            finally:
                if previous is not None:
                    self._acl.aclrtSetCurrentContext(previous)

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
            self._pending = run = OmRun(self, stream)
            return run

    def _finish(self, run: OmRun, stream: int) -> dict[str, np.ndarray]:
        with self._in_context():
            if run is not self._pending:
                raise OmError("this run's result has been fetched already")
            self._pending = None
            self._acl.aclrtSynchronizeStream(stream)
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
            dims = _Dims()
            self._acl.aclmdlGetCurOutputDims(self._desc, index, byref(dims))
            array = np.empty(dims.shape(), tensor.dtype)
            if array.nbytes:
                self._acl.aclrtMemcpy(array.ctypes.data, array.nbytes, address, array.nbytes, _TO_HOST)
            outputs[tensor.name] = array
        return outputs

    def close(self) -> None:
        """Frees what the session has on the device, when a run that was launched is done. Twice is once."""
        with self._turn:
            if self._is_closed:
                return
            with self._in_context():
                if self._pending is not None:
                    self._acl.aclrtSynchronizeStream(self._pending._stream)
                    self._pending = None
                self._closing.close()
            self._is_closed = True

    def __enter__(self) -> OmSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
