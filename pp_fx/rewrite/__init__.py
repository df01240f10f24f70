"""A model's decoder layers rewritten in place, checked against the originals, and given back."""
