"""Tensors as ranges of files, the tables of their names, and how they are fused and split."""
