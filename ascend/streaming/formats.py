"""Tensors in an NPU's private formats: their bytes as they are, and tensors over bytes that lie somewhere already.

A format belongs to the description that torch_npu has of a storage, so a part of a flat buffer has none of its own.
What torch_npu makes the results of its own captured graphs of (`torch_npu.npu._graph_tree`) gives it one: a storage
over an address, and a tensor of a format over that. Neither takes memory of the device nor owns it: what does has to
outlive it. `torch_npu.npu_change_data_ptr` would want a tensor with memory first, as large as the weight, and has no
int8.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

logger = logging.getLogger(__name__)

ND = 2
PLAIN = ("UNDEFINED", "NCHW", "NHWC", "ND", "HWCN", "NDHWC", "NCDHW", "NC", "NCL")  # the elements in order, no padding


def private_format(tensor: torch.Tensor) -> int | None:
    """The format of a whole tensor that an NPU keeps in one of its own, such as 29 for FRACTAL_NZ; else None."""
    if tensor.device.type != "npu":
        return None
    import torch_npu

    number = torch_npu.get_npu_format(tensor)
    name = torch_npu.Format(number).name
    if name in PLAIN:
        return None
    if not tensor.is_contiguous() or tensor.storage_offset():
        logger.warning("a weight %s is a view of one in %s: it is streamed as ND", list(tensor.shape), name)
        return None
    return int(number)


def stored_size(tensor: torch.Tensor) -> int:
    """Elements of a tensor of a private format, with those that fill its last fractals up."""
    import torch_npu

    return torch_npu.get_storage_size(tensor)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """What lies in the memory of a tensor of a private format: `[elements]`, in the order of that format."""
    return _over(tensor.data_ptr(), tensor.device, tensor.dtype, (stored_size(tensor),), stored_size(tensor), ND)


def of_format(flat: torch.Tensor, shape: Sequence[int], number: int) -> torch.Tensor:
    """A tensor of the format `number` over `flat`, which holds its elements in that order and outlives it."""
    return _over(flat.data_ptr(), flat.device, flat.dtype, shape, flat.numel(), number)


def _over(
    address: int, device: torch.device, dtype: torch.dtype, shape: Sequence[int], elements: int, number: int
) -> torch.Tensor:
    import torch_npu

    storage = torch_npu._C._construct_storage_from_data_pointer(address, device, elements * dtype.itemsize)
    strides = torch.empty(shape, device="meta").stride()
    about = {"dtype": dtype, "size": list(shape), "stride": list(strides), "storage_offset": 0, "npu_format": number}
    return torch_npu._C._construct_NPU_Tensor_From_Storage_And_Metadata(about, storage)


def locked(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the host like `tensor` that has no values: whoever reads or writes them is told why.

    A host's tensor cannot have its elements in the order of a private format, and a second copy of a model may be more
    than a host holds.
    """
    import torch_npu

    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    torch_npu._C._set_storage_access_error_msg(
        empty,
        "this weight is streamed in a format of the chip's own, in which the host cannot read or change it: call "
        "stop_streaming(model), or decompile it if it is compiled, and stream it again afterwards",
    )
    return empty


def is_locked(tensor: torch.Tensor) -> bool:
    return not torch._C._has_storage(tensor)
