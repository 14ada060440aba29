import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def active_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_attention_backend` also sets the backend of the process, which `reset_attention_backend` leaves."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
