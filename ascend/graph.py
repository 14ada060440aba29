"""The name that README showed before `from ascend import compile_pipeline`; programs written by it go on."""

from ascend.graphs.compile import compile_module, compile_pipeline, decompile_module, decompile_pipeline

__all__ = ["compile_module", "compile_pipeline", "decompile_module", "decompile_pipeline"]
