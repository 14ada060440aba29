"""Models that are larger than their device: weights stay with the host and come block by block, as they are needed."""

from ascend.streaming.blocks import find_blocks
from ascend.streaming.buffers import Buffers
from ascend.streaming.stream import Stream, lend_module, stop_streaming, stream_module

__all__ = ["Buffers", "Stream", "find_blocks", "lend_module", "stop_streaming", "stream_module"]
