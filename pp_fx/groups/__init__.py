"""Channel groups: which weights' rows and columns fall together, found by dataflow and proved by execution."""
