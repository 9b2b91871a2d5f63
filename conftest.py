"""Every process of the tests computes on one thread.

OpenMP's threads spin while they wait, so beside one other busy process two of them take ten times as long as one.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported
