"""The history from dense forward passes over sample text, on one process or many; its file."""
