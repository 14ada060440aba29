"""What a service is made of, as each of its processes is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        model, backend, dtype, kernels, compiled: as for `CLIPInferenceService`; `dtype` by its name.
        kind: of the devices, "npu", "cuda" or "cpu".
        replicas: how many load the model, each on a device of its own.
        threads: that a replica on the CPU computes with.
        batch_size: most inputs of a forward; 1 computes each by itself.
        wait_seconds: that the first input of a forward waits for others.
        pending: most inputs that wait or are computed; those of further requests are refused.
        inputs: most of one request, at most `pending`.
        pixels: most of one request's pictures together, and of all that are decoded at a time.
        body_bytes: most of one request.
        timeout_seconds: of one request.
        token: that requests have to bring; none: anybody may ask.
    """

    model: str
    backend: str
    dtype: str | None
    kernels: bool
    compiled: bool
    kind: str
    replicas: int
    threads: int
    batch_size: int
    wait_seconds: float
    pending: int
    inputs: int
    pixels: int
    body_bytes: int
    timeout_seconds: float
    token: str | None
