"""Layouts: sets of files that hold a checkpoint."""
