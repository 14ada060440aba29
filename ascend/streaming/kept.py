"""What of a streamed model stays on the device: blocks for which there is room, and what is in no block."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from ascend.streaming.blocks import tensors_of
from ascend.streaming.host_copy import Prepare


class KeptBlock:
    """A block that stays on the device, in the form that `prepare` gave it there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.undo = ExitStack()
        self.seen: tuple[tuple[int, int], ...] = ()

    def is_current(self) -> bool:
        """Whether its tensors are those, and lie there, as when it was prepared."""
        return self.seen == self._look()

    def forget(self) -> None:
        """Undo what `prepare` made of it, also of tensors that are no longer its own, which nobody then holds."""
        self.undo.close()

    def prepare(self, prepare: Prepare | None) -> None:
        """On the device. None: it stays as it is."""
        if prepare is not None:
            prepare(self.module, self.undo)
        self.seen = self._look()

    def _look(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(tensor), tensor.data_ptr()) for tensor in tensors_of(self.module))


class Brought:
    """Tensors that are on the device while a model is streamed, and the views of files that some of them were."""

    def __init__(self, device: torch.device, is_mapped: bool) -> None:
        self.device, self.is_mapped = device, is_mapped
        self.views: dict[int, tuple[torch.Tensor, int]] = {}  # and where it was copied to

    def bring(self, tensor: torch.Tensor) -> None:
        _, address = self.views.get(id(tensor), (None, 0))
        if not self.is_mapped or tensor.device.type != "cpu" or tensor.data_ptr() == address:
            tensor.data = tensor.data.to(self.device)
            return
        view = tensor.data
        tensor.data = view.to(self.device, copy=True)  # aligned, as in no file
        self.views[id(tensor)] = view, tensor.data_ptr()

    def take_back(self, tensor: torch.Tensor) -> None:
        """To the host; one that is as its file has it is a view of that again, and takes no memory."""
        view, _ = self.views.pop(id(tensor), (None, 0))
        host = tensor.data.to("cpu")
        is_same = view is not None and view.dtype == host.dtype and torch.equal(view, host)
        tensor.data = view if is_same and view is not None else host
