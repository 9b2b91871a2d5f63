"""Pipeline parallelism: ranges of layers on different ranks, and micro-batches that follow each other through them."""

from mm_parallel.pipeline.pipeline import Pipeline as Pipeline
