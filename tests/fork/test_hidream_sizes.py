"""HiDream's transformer asks no tensor how large a picture is."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from processors import enable_fused_kernels
from tests.processors.models.test_hidream import predict
from tests.tiny_hidream import make_transformer


class ValuesRead(TorchDispatchMode):
    """Counts the numbers that Python reads out of tensors, for each of which an accelerator would be waited for."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_a_forward_reads_no_values() -> None:
    model = make_transformer()
    enable_fused_kernels(model)  # upstream's experts read how many tokens each has
    with ValuesRead() as values:
        predict(model)
    assert values.number == 0
