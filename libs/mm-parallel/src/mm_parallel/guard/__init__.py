"""Errors instead of hangs: ranks that were told different things say so, and no rank waits for one that is gone.

`join` waits for all ranks, for a while. `agree` compares before the work starts. `Watchdog` runs next to it: a
collective cannot be interrupted, so a thread ends its process, with a message, as soon as the store of the process
group tells that another rank failed.

    agree      what ranks were told          heartbeat  what they tell each other while they work
    diagnosis  whom to name                  watchdog   the thread that listens, and ends the process
    join       how they come together
"""

from mm_parallel.guard.agree import agree as agree
from mm_parallel.guard.agree import agree_on as agree_on
from mm_parallel.guard.join import join as join
from mm_parallel.guard.watchdog import Watchdog as Watchdog
