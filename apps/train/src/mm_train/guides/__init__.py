"""MindSpeed-MM's names for layouts and memory, and what they are called here. Imports no torch.

    parallel, memory, notes = translate({"TP": 2, "CP": 4, "context-parallel-algo": "megatron_cp_algo"})
    ParallelConfig(**parallel)  # tp=2, ring=4

`names` is the one table; `translate` knows which names only mean something together; `from_guides` and `arguments` let
both names be used in one configuration.
"""

from mm_train.guides.given import arguments as arguments
from mm_train.guides.given import from_guides as from_guides
from mm_train.guides.names import table as table
from mm_train.guides.translate import translate as translate
