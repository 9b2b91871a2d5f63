"""Runs in the browser, while they grow: ``python -m mm_train.page runs/``."""
