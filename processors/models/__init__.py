"""What of a model is replaced so that it computes by `processors.kernels`, and what is not."""
