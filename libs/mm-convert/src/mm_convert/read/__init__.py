"""Reading: what lies at a path, what its tensors are, and the checkpoint that it is."""
