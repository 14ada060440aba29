"""Pictures and texts in one space, by CLIP or SigLIP: a service, its programs, and a benchmark."""

from runners.clip.service import CLIPInferenceService

__all__ = ["CLIPInferenceService"]
