"""Exporters (ONNX and others) for transformed models; none is part of this version."""
