"""From a decoder layer to a `torch.fx` graph: find the layers, record their calls, trace, clean."""
