"""Functions that run side by side up to a point where they meet."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Exchange(NamedTuple):
    """What every function gave and got, and how gradients go back: of what each got -> of what each gave."""

    sent: list[tuple[Tensor, ...]]
    received: list[Tensor]
    back: Callable[[list[Tensor]], list[tuple[Tensor, ...]]]


class Rendezvous:
    """n functions in n threads, of which one runs at a time: in their order, each until it meets the others.

    An exchange cuts autograd's graph: what a function receives is a leaf. `exchanges` says how the pieces go together.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.exchanges: list[Exchange] = []
        self.results: list[Any] = [None] * n
        self._turn = [threading.Semaphore(0) for _ in range(n)]
        self._here = threading.local()
        self._sent: list[tuple[Tensor, ...]] = []
        self._error: BaseException | None = None

    def run(self, functions: list[Callable[[], Any]], grad: bool) -> list[Any]:
        """Their results, by function; also kept in `results`. Raises what the first of them raised."""
        threads = [threading.Thread(target=self._run, args=(i, fn, grad)) for i, fn in enumerate(functions)]
        for thread in threads:
            thread.start()
        self._turn[0].release()
        for thread in threads:
            thread.join()
        if self._error:
            raise self._error
        return self.results

    def meet(self, sent: tuple[Tensor, ...], combine: Callable) -> Tensor:
        """Called by a function that runs: gives something, and gets what `combine` makes of what all gave.

        combine(what each gave) returns (what each gets, the way back of `Exchange`); it runs once, without autograd.
        """
        self._sent.append(sent)
        if len(self._sent) == self.n:
            everyones, self._sent = self._sent, []
            with torch.no_grad():
                received, back = combine([tuple(x.detach() for x in own) for own in everyones])
            differentiable = any(x.requires_grad for own in everyones for x in own)
            received = [x.requires_grad_(differentiable) for x in received]
            self.exchanges.append(Exchange(everyones, received, back))
        me = self._here.index
        self._pass(me)
        self._wait(me)
        return self.exchanges[-1].received[me]

    def _run(self, index: int, function: Callable[[], Any], grad: bool) -> None:
        self._here.index = index
        try:
            self._wait(index)
            with torch.set_grad_enabled(grad):  # each thread has its own
                self.results[index] = function()
        except BaseException as error:
            self._error = self._error or error  # the others raise it as well, at their next turn
        self._pass(index)

    def _wait(self, index: int) -> None:
        self._turn[index].acquire()
        if self._error:
            raise self._error

    def _pass(self, index: int) -> None:
        self._turn[(index + 1) % self.n].release()
