"""Zero-shot classification, and features of pictures and texts, by CLIP or SigLIP on any device."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from ascend import DeviceManager
from runners.clip.backends import Backend, ExportedBackend, TorchBackend
from runners.clip.checkpoint import load_processor
from runners.clip.inputs import Picture, prepare_pictures, prepare_texts
from runners.clip.timing import measure, statistics
from runners.offline.folder import OM, ONNX

logger = logging.getLogger(__name__)

TORCH = "torch"
BACKENDS = (TORCH, ONNX, OM)
MIB = 2**20
Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodedTexts:
    """
    Attributes:
        features: [count, width], of length 1 or not.
        truncated: those of `texts` that were too long, and lost their end.
    """

    texts: tuple[str, ...]
    features: Tensor
    truncated: list[str]


class CLIPInferenceService:
    """A CLIP or SigLIP that is loaded once and asked often.

    Args:
        model_path: a folder or a name on the hub; of `backend` "onnx" and "om" a folder that convert_to_om.py wrote.
        device: "auto" (NPU, else CUDA, else CPU; the environment's `PREFERRED_DEVICE` overrules), or as "npu:1".
        use_fp16: compute in float16 on an accelerator; the CPU goes on in float32, with a warning.
        dtype: in which to compute, instead of `use_fp16`; float32 without either. An exported model has its own.
        backend: "torch", "onnx" or "om".
        kernels: True lets the towers attend by the device's fused kernels, a list by these.
        compiled: whether to make graphs of the towers.

    Attributes:
        device: as "npu:0".

    Raises:
        DeviceError: there is no such device.
        UserError: the model cannot be loaded.
        ValueError: the arguments contradict each other.
    """

    def __init__(
        self,
        model_path: str,
        device: str = "auto",
        use_fp16: bool = False,
        dtype: torch.dtype | None = None,
        backend: str = TORCH,
        kernels: bool | Sequence[str] = False,
        compiled: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend '{backend}' is unknown: use {', '.join(BACKENDS)}")
        if use_fp16 and dtype not in (None, torch.float16):
            raise ValueError(f"use_fp16 and dtype={dtype} name two precisions: give one")
        if backend != TORCH and (use_fp16 or dtype or kernels or compiled):
            raise ValueError(f"backend '{backend}' computes as its files were converted: no dtype, kernels or graphs")
        model_path = str(model_path)
        self.backend: Backend
        if backend == TORCH:
            manager = DeviceManager(None if device == "auto" else device)
            dtype = dtype or (torch.float16 if use_fp16 else torch.float32)
            if use_fp16 and manager.device.type == "cpu":
                logger.warning("float16 is slow on the CPU: computing in float32")
                dtype = torch.float32
            self.manager: DeviceManager | None = manager
            self.backend = TorchBackend(model_path, manager, dtype, kernels, compiled)
        else:
            self.manager = None
            self.backend = ExportedBackend(model_path, device, backend)
        self.processor = load_processor(model_path)
        self._cut: set[str] = set()  # texts of which a warning said that they are too long
        self.device = self.backend.device
        self.scoring = self.backend.scoring

    def predict(self, image: Picture, texts: Sequence[str]) -> dict[str, Any]:
        """Which of `texts` describes `image` best.

        Returns:
            `texts`; `probabilities` of each, which add up to 1 under `scoring` "softmax" (CLIP) and are each text's
            own under "sigmoid" (SigLIP); `logits`; `best_match` and `best_score`; `inference_time_ms` from the
            opened picture to the probabilities; `device`; `truncated_texts`, which were too long and lost their end.

        Raises:
            UserError: the picture cannot be read.
            ValueError: there is no text, or an empty one.
        """
        return self.batch_predict([image], texts, batch_size=1)[0]

    def batch_predict(
        self, images: Iterable[Picture], texts: Iterable[str] | EncodedTexts, batch_size: int = 4
    ) -> list[dict[str, Any]]:
        """`predict` of each of `images`, by one forward for `batch_size` of them, and one of the texts in all.

        `texts` may have been through `encode_texts`, for many calls. `inference_time_ms` is a picture's share of the
        whole time. Of a generator of images there are `batch_size` in memory.
        """
        start = time.perf_counter()
        encoded = texts if isinstance(texts, EncodedTexts) else self.encode_texts(texts)
        text_features = _normalized(encoded.features, True)
        logits: list[Tensor] = []
        for batch in _batches(images, batch_size):
            logits += self.scoring.logits(self.extract_image_features(batch), text_features).cpu()
        milliseconds = (time.perf_counter() - start) * 1000 / max(len(logits), 1)
        return [self._result(row, encoded, milliseconds) for row in logits]

    def _result(self, logits: Tensor, encoded: EncodedTexts, milliseconds: float) -> dict[str, Any]:
        probabilities = self.scoring.probabilities(logits)
        best = int(logits.argmax())
        return {
            "texts": list(encoded.texts),
            "probabilities": probabilities.tolist(),
            "best_match": encoded.texts[best],
            "best_score": float(probabilities[best]),
            "inference_time_ms": milliseconds,
            "device": self.device,
            "scoring": self.scoring.kind,
            "logits": logits.tolist(),
            "truncated_texts": encoded.truncated,
        }

    def extract_image_features(self, images: Picture | Iterable[Picture], normalize: bool = True) -> Tensor:
        """[count, width] float32 where the backend computes, of length 1 unless `normalize` is off."""
        pictures: list[Picture] = [images] if isinstance(images, Picture) else list(images)
        if not pictures:
            raise ValueError("there is no picture to make features of")
        values = prepare_pictures(self.processor, pictures, self.backend.takes_bytes)
        return _normalized(self.backend.image_features(values), normalize)

    def extract_text_features(self, texts: str | Iterable[str], normalize: bool = True) -> Tensor:
        """As `extract_image_features`. Texts that are too long lose their end, with a warning."""
        return self.encode_texts([texts] if isinstance(texts, str) else texts, normalize).features

    def encode_texts(self, texts: Iterable[str], normalize: bool = True) -> EncodedTexts:
        """The features of `texts` for many calls of `batch_predict`."""
        given, texts = texts, [] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"texts must be a list of one or more texts that are not empty, not {given!r:.100}")
        length = self.backend.text_length
        tokens = prepare_texts(self.processor, texts, length, self.backend.pads_texts)
        for text in sorted({*tokens.truncated} - self._cut):
            self._cut.add(text)
            logger.warning("only the first %d tokens of this text count: %.60s...", length, text)
        features = _normalized(self.backend.text_features(tokens.input_ids), normalize)
        return EncodedTexts(tuple(texts), features, tokens.truncated)

    def clip_scores(self, images: Sequence[Picture], texts: Sequence[str], batch_size: int = 4) -> list[float]:
        """Of each of `images` with the one of `texts` beside it: 100 times their cosine.

        CLIPScore (arXiv 2104.08718) without its factor and its floor. Only scores of one model can be compared.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts are no pairs")
        scores: list[float] = []
        for pictures, captions in zip(_batches(images, batch_size), _batches(texts, batch_size), strict=True):
            cosines = (self.extract_image_features(pictures) * self.extract_text_features(captions)).sum(dim=1)
            scores += (100 * cosines).tolist()
        return scores

    def benchmark(
        self, image: Picture, texts: Sequence[str], num_runs: int = 100, warmup_runs: int = 10
    ) -> dict[str, Any]:
        """How long `predict` takes, with preparing the inputs and bringing the result back.

        Returns:
            see `runners.clip.timing.statistics`; `device`; `first_ms`, of the first call, which loads kernels and
            makes graphs; on an accelerator `memory_allocated_mb`, `memory_reserved_mb` and `memory_peak_mb` in MiB,
            the last from the first call on.
        """
        if self.manager:
            self.manager.reset_peak_memory()
        seconds, first = measure(lambda: self.predict(image, texts), self.backend.synchronize, num_runs, warmup_runs)
        result = {**statistics(seconds), "device": self.device, "first_ms": None if first is None else first * 1000}
        if self.manager and self.manager.device.type != "cpu":
            memory = self.manager.memory_stats()
            result |= {f"memory_{name}_mb": memory[name] / MIB for name in ("allocated", "reserved", "peak")}
        return result

    def close(self) -> None:
        """Give back what an exported model holds on its device, and unused memory of torch's. Twice is once."""
        self.backend.close()
        if self.manager:
            self.manager.empty_cache()


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` of `items`, the last one of what is left.

    Raises:
        ValueError: `items` is a single one, or `size` is less than 1.
    """
    if isinstance(items, Picture):
        raise ValueError(f"a list is wanted, also of a single one, not {items!r:.100}")
    if size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {size}")
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def _normalized(features: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(features, dim=-1) if normalize else features
