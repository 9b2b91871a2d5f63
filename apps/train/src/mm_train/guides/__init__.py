"""MindSpeed-MM's names for layouts, memory and data, and what they are called here. Imports no torch.

    parallel, memory, notes = translate({"TP": 2, "CP": 4, "context-parallel-algo": "megatron_cp_algo"})
    ParallelConfig(**parallel)  # tp=2, ring=4
    data, notes = translate_data({"interleaved": True, "interleaved_steps": 10})  # encode_every=10

`names` is the one table; `translate` knows which names only mean something together; `from_guides` and `arguments` let
both names be used in one configuration.
"""

from mm_train.guides.given import arguments as arguments
from mm_train.guides.given import from_guides as from_guides
from mm_train.guides.names import SECTIONS as SECTIONS
from mm_train.guides.names import table as table
from mm_train.guides.translate import translate as translate
from mm_train.guides.translate import translate_data as translate_data
