"""What computes features: torch, or towers that were exported to ONNX or to an NPU's offline models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ascend import DeviceManager, compile_module
from ascend.device import DeviceError, inference_dtypes
from processors import enable_fused_kernels
from runners.cli import UserError
from runners.clip.checkpoint import SIGMOID, Scoring, image_tower, load_model, text_length_of, text_tower
from runners.offline.folder import OM, ONNX, ExportedTower, read_folder
from runners.weight_files import first_line

PROVIDERS = {"npu": "CANNExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
# A compiled model is kept in the working directory by default, under a name that does not tell chips apart.
CANN_OPTIONS = {"dump_om_model": "0"}


class Backend(Protocol):
    """Makes features of inputs.

    Attributes:
        device: where, as "npu:0".
        text_length: tokens that a text may have.
        pads_texts: whether texts have to have all of them.
        takes_bytes: whether pictures are uint8 and not normalised.
    """

    device: str
    scoring: Scoring
    text_length: int
    pads_texts: bool
    takes_bytes: bool

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[count, width] float32, where the backend computes, of [count, 3, height, width] on the CPU."""

    def text_features(self, input_ids: Tensor) -> Tensor:
        """[count, width] float32, where the backend computes, of int64 [count, length] on the CPU."""

    def synchronize(self) -> None:
        """Wait until all features are there."""

    def close(self) -> None:
        """Give back what the backend holds; it is of no use afterwards. Twice is once."""


class TorchBackend:
    """The model itself.

    Args:
        path: a folder, or a name on the hub.
        device: as for `DeviceManager`.
        dtype: in which the towers compute.
        kernels: False, or let them attend by the device's fused kernels; a list of names: by these.
        compiled: make a graph of each tower for each number of inputs, which is filled up to a power of two.

    Attributes:
        flags: what was done for `kernels` and `compiled`.
    """

    takes_bytes = False

    def __init__(
        self,
        path: str,
        manager: DeviceManager,
        dtype: torch.dtype,
        kernels: bool | Sequence[str] = False,
        compiled: bool = False,
    ) -> None:
        if dtype not in inference_dtypes(manager.device):
            raise UserError(f"{manager.device} does not compute in {dtype}: take another dtype")
        model: PreTrainedModel = load_model(path, dtype).to(manager.device)
        self.manager, self.dtype, self.compiled = manager, dtype, compiled
        self.device = str(manager.device)
        self.scoring = Scoring.of(model)
        self.text_length = text_length_of(model.config)
        self.pads_texts = compiled or self.scoring.kind == SIGMOID
        self.flags: dict[str, Any] = {"FA": False, "dynamo": False}
        if kernels:
            try:
                self.flags["FA"] = enable_fused_kernels(model, None if kernels is True else kernels)
            except ValueError as error:
                raise UserError(f"--FA: {error}") from error
        images, texts = image_tower(model), text_tower(model)
        if compiled:
            named = {"image tower": images, "text tower": texts}
            self.flags["dynamo"] = {name: compile_module(tower, name=name) for name, tower in named.items()}
        self.images: torch.nn.Module | None = images
        self.texts: torch.nn.Module | None = texts

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return self._run(self.images, pixel_values.to(self.dtype))

    def text_features(self, input_ids: Tensor) -> Tensor:
        return self._run(self.texts, input_ids)

    @torch.no_grad()
    def _run(self, tower: torch.nn.Module | None, inputs: Tensor) -> Tensor:
        if tower is None:
            raise RuntimeError("the model is closed")
        count = len(inputs)
        if self.compiled:
            inputs = filled_up(inputs, 1 << (count - 1).bit_length())
        return tower(inputs.to(self.manager.device))[:count].float()

    def synchronize(self) -> None:
        self.manager.synchronize()

    def close(self) -> None:
        self.images = self.texts = None


def filled_up(inputs: Tensor, count: int) -> Tensor:
    """`count` inputs: what is missing repeats the last one."""
    return torch.cat([inputs, inputs[-1:].expand(count - len(inputs), *inputs.shape[1:])])


class Session(Protocol):
    """Computes one exported tower. `ascend.om.OmSession` is one."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]: ...


class OnnxSession:
    """A tower in onnxruntime, on the device that was asked for and on no other.

    Raises:
        DeviceError: this onnxruntime does not compute there.
        UserError: it cannot read the file.
    """

    def __init__(self, path: Path, device: Place) -> None:
        import onnxruntime

        provider = PROVIDERS[device.type]
        options = {} if device.type == "cpu" else {"device_id": str(device.number)}
        if device.type == "npu":
            options |= CANN_OPTIONS
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()  # as a replica was told to have, and as torch's own
        try:
            self.session = onnxruntime.InferenceSession(path, settings, providers=[(provider, options)])
        except Exception as error:  # its errors have no common class
            raise UserError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
        if self.session.get_providers()[0] != provider:  # it falls back to the CPU with a message alone
            raise DeviceError(f"onnxruntime does not compute {path} on {device}, and fell back to the CPU")

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))


class Place(NamedTuple):
    """A device by its name alone: what runs exported models needs no torch_npu."""

    type: str
    number: int

    def __str__(self) -> str:
        return self.type if self.type == "cpu" else f"{self.type}:{self.number}"


def choose_place(name: str, kind: str) -> Place:
    """The device called `name`, or for "auto" the best, that models of `kind` can run on.

    Raises:
        DeviceError: there is no such device.
    """
    match = re.fullmatch(r"(auto|npu|cuda|cpu)(?::(\d+))?", name)
    if match is None:
        raise DeviceError(f"device '{name}' is unknown: use npu, cuda or cpu, or one of several as npu:1")
    asked, index = match[1], int(match[2] or 0)
    if kind == OM:
        if asked not in ("auto", "npu"):
            raise DeviceError(f"device '{name}': offline models run on NPUs alone; take another backend")
        return Place("npu", index)
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"backend onnx needs onnxruntime: pip install onnxruntime ({error})") from error
    found = [device for device, provider in PROVIDERS.items() if provider in onnxruntime.get_available_providers()]
    if asked == "auto":
        return Place(found[0], index)
    if asked not in found:
        raise DeviceError(
            f"device '{name}' is not there for onnxruntime {onnxruntime.__version__}, which has {', '.join(found)}"
        )
    return Place(asked, index)


class ExportedBackend:
    """The two towers of a folder that convert_to_om.py wrote, as ONNX or as offline models.

    Args:
        path: of the folder.
        device: "auto", or as for `DeviceManager`.
        kind: ONNX or OM, which file of each tower.
    """

    pads_texts = True

    def __init__(self, path: str, device: str, kind: str) -> None:
        exported = read_folder(Path(path), kind)
        place = choose_place(device, kind)
        self.device, self.scoring, self.text_length = str(place), Scoring(**exported.scoring), exported.text_length
        self.takes_bytes = exported.images.takes_bytes and kind == OM
        with ExitStack() as stack:
            self._images = _open_tower(exported.images, place, kind, stack)
            self._texts = _open_tower(exported.texts, place, kind, stack)
            self._stack = stack.pop_all()

    def image_features(self, pixel_values: Tensor) -> Tensor:
        if self.takes_bytes:
            pixel_values = pixel_values.permute(0, 2, 3, 1).contiguous()
        return self._images(pixel_values)

    def text_features(self, input_ids: Tensor) -> Tensor:
        return self._texts(input_ids)

    def synchronize(self) -> None:
        """A session returns when its results are on the host."""

    def close(self) -> None:
        self._stack.close()


def _open_tower(tower: ExportedTower, device: Place, kind: str, stack: ExitStack) -> Callable[[Tensor], Tensor]:
    """A function from inputs of any number to features [count, width] on the CPU."""
    path = tower.path(kind)
    session: Session
    if kind == ONNX:
        session = OnnxSession(path, device)
    else:
        from ascend.om import OmError, OmSession

        try:
            session = stack.enter_context(OmSession(path, device.number))
        except OmError as error:
            raise UserError(f"cannot load {path} on {device}: {error}") from error

    def run(inputs: Tensor) -> Tensor:
        parts = []
        for start, size in shares(len(inputs), tower.batch_sizes):
            part = inputs[start : start + size]
            (result,) = session.run({tower.input: filled_up(part, size).numpy()}).values()
            parts.append(torch.from_numpy(result)[: len(part)].float())
        return torch.cat(parts)

    return run


def shares(count: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where each of the parts starts that `count` inputs are computed in, and which of `sizes` it has.

    The largest size as often as it is full, then the smallest that holds the rest.
    """
    largest = max(sizes)
    full = [(start, largest) for start in range(0, count - count % largest, largest)]
    rest = count % largest
    return full + ([(count - rest, min(size for size in sizes if size >= rest))] if rest else [])
