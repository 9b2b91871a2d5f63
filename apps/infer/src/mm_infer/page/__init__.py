"""A page in the browser: ``python -m mm_infer.page --weights W``. Videos are made, or questions answered, on it."""
