"""To verify a layout to the last bit: a model that computes the same on 1, 2 and 4 ranks. Slow, and not for training.

check_layout(parallel, world)                    # Ulysses over all ranks, and nothing else
model = parallelize(model, plan, make_mesh(parallel, "cpu"))
"""

from mm_parallel.verify.exact import check_layout as check_layout
from mm_parallel.verify.exact import parallelize as parallelize
