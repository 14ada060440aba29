"""The runtime around a model: devices, weights and graphs."""
