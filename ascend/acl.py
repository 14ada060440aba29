"""CANN's C functions for offline models, by ctypes: libascendcl.so, in which `aclmdl*` and `aclrt*` are.

Their prototypes: CANN's "AscendCL API", and acl_mdl.h, acl_rt.h and acl_base.h in torch_npu's include/third_party/acl.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

_LIBRARY = "libascendcl.so"
_ALREADY_INITIALISED = 100002
_NO_CONTEXT = 107002


class OmError(RuntimeError):
    """An offline model that cannot be loaded or run, or feeds that are not what it takes."""


class Dims(ctypes.Structure):  # aclmdlIODims
    _fields_ = (("name", c_char * 128), ("count", c_size_t), ("sizes", c_int64 * 128))

    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[: self.count])


class Batches(ctypes.Structure):  # aclmdlBatch
    _fields_ = (("count", c_size_t), ("batches", c_uint64 * 128))


class Sizes(ctypes.Structure):  # aclmdlHW
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
    "aclmdlGetInputDimsV2": (c_int, c_void_p, c_size_t, POINTER(Dims)),
    "aclmdlGetOutputDims": (c_int, c_void_p, c_size_t, POINTER(Dims)),
    "aclmdlGetCurOutputDims": (c_int, c_void_p, c_size_t, POINTER(Dims)),
    "aclmdlGetDynamicBatch": (c_int, c_void_p, POINTER(Batches)),
    "aclmdlGetDynamicHW": (c_int, c_void_p, c_size_t, POINTER(Sizes)),
    "aclmdlGetInputDynamicGearCount": (c_int, c_void_p, c_size_t, POINTER(c_size_t)),
    "aclmdlGetInputDynamicDims": (c_int, c_void_p, c_size_t, POINTER(Dims), c_size_t),
    "aclmdlSetDynamicBatchSize": (c_int, c_uint32, c_void_p, c_size_t, c_uint64),
    "aclmdlSetDynamicHWSize": (c_int, c_uint32, c_void_p, c_size_t, c_uint64, c_uint64),
    "aclmdlSetInputDynamicDims": (c_int, c_uint32, c_void_p, c_size_t, POINTER(Dims)),
    "aclmdlCreateDataset": (c_void_p,),
    "aclmdlDestroyDataset": (c_int, c_void_p),
    "aclmdlAddDatasetBuffer": (c_int, c_void_p, c_void_p),
    "aclCreateDataBuffer": (c_void_p, c_void_p, c_size_t),
    "aclDestroyDataBuffer": (c_int, c_void_p),
    "aclmdlExecute": (c_int, c_uint32, c_void_p, c_void_p),
    "aclmdlExecuteAsync": (c_int, c_uint32, c_void_p, c_void_p, c_void_p),
}
_NOT_CHECKED = {"aclmdlGetInputDataType", "aclmdlGetOutputDataType"}


class Acl:
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

    @contextmanager
    def in_context(self, context: int) -> Iterator[None]:
        """The calling thread has that context, and its own again afterwards, if it had one."""
        previous = self.context()
        self.aclrtSetCurrentContext(context)
        try:
            yield
        finally:
            if previous is not None:
                self.aclrtSetCurrentContext(previous)


@cache
def load_acl() -> Acl:
    """The library, initialised once a process. Raises OmError where it is not there."""
    return Acl()
