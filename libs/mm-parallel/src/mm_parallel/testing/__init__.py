"""For our tests and for those of others: ranks of this machine, a model to cut, and what to compare."""

from mm_parallel.testing.compare import assert_same_grads as assert_same_grads
from mm_parallel.testing.compare import gradients as gradients
from mm_parallel.testing.ladder import TinyLadder as TinyLadder
from mm_parallel.testing.ladder import TinyTower as TinyTower
from mm_parallel.testing.ladder import TwoLadders as TwoLadders
from mm_parallel.testing.launch import End as End
from mm_parallel.testing.launch import launch as launch
from mm_parallel.testing.ranks import spawn as spawn
