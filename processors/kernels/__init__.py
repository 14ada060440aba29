"""What a layer of a model computes, by the best kernel of the device: attention, norms and activations."""
