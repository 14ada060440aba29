"""Models as files that run without torch: ONNX, and the offline models of NPUs that are made of it."""
