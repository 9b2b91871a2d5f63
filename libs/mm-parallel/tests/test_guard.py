"""Every process ends within seconds with a message that names the rank and the cause. Real processes, real deaths."""

import ctypes
import inspect
import math
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mm_parallel.absence import absence_told
from mm_parallel.guard import Watchdog, agree, join
from mm_parallel.guard.heartbeat import Board
from mm_parallel.testing import End, launch, spawn

FAST = {"deadline": 3, "interval": 0.2, "silence": 2.5}  # on a busy machine a rank may not run for two seconds


def together() -> None:
    dist.all_reduce(torch.ones(1))


def one_raises(rank: int, watch: Watchdog) -> None:
    watch.at("step 3: backward")
    together()  # so that all are in this phase
    if rank == 2:
        raise ValueError("the batch has 3 samples, but must have 4")
    together()


def one_blames_the_network(rank: int, watch: Watchdog) -> None:
    watch.at("step 3")
    together()  # so that all are in this phase
    if rank == 1:
        raise OSError("connection to the feature store lost")
    together()


def the_host_raises(rank: int, watch: Watchdog) -> None:
    watch.at("step 3")
    together()  # so that all are in this phase
    if rank == 0:
        raise ValueError("no such file: data.txt")
    together()


def one_is_killed(rank: int, watch: Watchdog) -> None:
    watch.at("step 4")
    time.sleep(0.5)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    together()


def the_host_is_killed(rank: int, watch: Watchdog) -> None:
    watch.at("step 4")
    time.sleep(0.5)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    together()


def one_sleeps(rank: int, watch: Watchdog) -> None:
    watch.at("step 5")
    if rank == 1:
        time.sleep(1000)
    together()


def one_is_behind(rank: int, watch: Watchdog) -> None:
    watch.at("step 5: data")
    if rank == 1:
        time.sleep(1000)
    watch.at("step 5: forward")
    together()


def one_ends_early(rank: int, watch: Watchdog) -> None:
    watch.at("step 6")
    together()
    if rank != 1:
        watch.at("step 7")
        together()


def one_keeps_the_lock(rank: int, watch: Watchdog) -> None:
    watch.at("step 8")
    together()
    time.sleep(0.5)  # for a heartbeat
    if rank == 1:
        ctypes.PyDLL(None).sleep(1000)  # no Python thread of this process runs any more
    together()


def one_will_not_end(rank: int, watch: Watchdog) -> None:
    watch.at("step 9")
    try:
        if rank == 1:
            raise ValueError("first")
        together()
    finally:
        if rank == 1:
            sys.exit = lambda code=0: None
            threading.Thread(target=time.sleep, args=(1000,)).start()  # the interpreter waits for it


def all_is_well(rank: int, watch: Watchdog) -> None:
    watch.at("loading", deadline=math.inf)
    time.sleep(4 * (rank == 1))  # longer than a phase may take; the others wait at the collective
    watch.at("step 0")
    together()
    watch.at("saving", deadline=60)
    time.sleep(4 * (rank == 0))
    watch.at("step 1")
    together()
    time.sleep(rank / 2)


def clocks_are_an_hour_apart(rank: int, watch: Watchdog) -> None:
    one_sleeps(rank, watch)


def comes(rank: int) -> None:
    with join(**FAST, start=4) as watch:
        watch.at("step 1")
        together()


def one_never_comes(rank: int) -> None:
    if rank != 1:
        comes(rank)


def the_host_never_comes(rank: int) -> None:
    if rank:
        comes(rank)


def refuse() -> None:
    with absence_told():
        sys.stderr.write("no.toml is not there")
        sys.exit(2)


def one_cannot_come(rank: int) -> None:
    if rank == 1:
        refuse()
    else:
        comes(rank)


def the_host_cannot_come(rank: int) -> None:
    if rank == 0:
        refuse()
    else:
        time.sleep(1)
        comes(rank)


def none_can_come(rank: int) -> None:
    refuse()


def one_fails_while_it_joins(rank: int) -> None:
    if rank == 1:
        dist.init_process_group = lambda *_, **__: sys.exit("its network is down")
    comes(rank)


def one_is_killed_while_it_joins(rank: int) -> None:
    if rank == 1:
        dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    comes(rank)


def one_is_stopped(rank: int) -> None:
    with join(**FAST, start=4) as watch:
        watch.at("step 4")
        time.sleep(0.5)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        together()


def one_is_interrupted(rank: int) -> None:
    with join(**FAST, start=4) as watch:
        watch.at("step 4")
        together()
        if rank == 1:
            raise KeyboardInterrupt
        together()


def main(rank: int, scenario: str) -> None:
    if "watch" not in inspect.signature(globals()[scenario]).parameters:  # it joins by itself
        return globals()[scenario](rank)
    if scenario == "clocks_are_an_hour_apart":
        now = time.time
        time.time = lambda: now() + 3600 * rank
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with Watchdog(**FAST) as watch:
        globals()[scenario](rank, watch)
    assert threading.active_count() == 1


def run(scenario, world: int, within: float = 60) -> list[End]:
    """Runs a function of this file on `world` ranks, and kills none: how each ended within some seconds."""
    return launch(world, main, scenario.__name__, within=within)


def others(ends: list[End], culprit: int) -> list[End]:
    return ends[:culprit] + ends[culprit + 1 :]


def test_a_rank_that_raises_ends_all_with_its_error():
    ends = run(one_raises, 3)
    assert [end.code for end in ends] == [1, 1, 1]
    for rank in (0, 1):
        message = (
            f"[rank {rank}] rank 2 failed: ValueError: the batch has 3 samples, but must have 4; this rank was in "
        )
        assert ends[rank].said.count(message + "step 3: backward") == 1
    assert "Traceback" in ends[2].said
    assert "ValueError: the batch has 3 samples" in ends[2].said


def test_the_host_of_the_store_stays_until_its_error_is_told():
    ends = run(the_host_raises, 3)
    assert [end.code for end in ends] == [1, 1, 1]
    assert "ValueError: no such file: data.txt" in ends[0].said
    for end in ends[1:]:
        assert "rank 0 failed: ValueError: no such file: data.txt; this rank was in step 3" in end.said


def test_an_error_that_may_have_another_cause_is_told_when_there_is_none():
    ends = run(one_blames_the_network, 2)
    assert [end.code for end in ends] == [1, 1]
    assert "rank 1 failed: OSError: connection to the feature store lost; this rank was in step 3" in ends[0].said
    assert "OSError: connection to the feature store lost" in ends[1].said


def test_a_killed_rank_is_named_with_the_line_where_it_was():
    ends = run(one_is_killed, 3)
    assert [end.code for end in ends] == [1, -signal.SIGKILL, 1]
    for end in others(ends, 1):
        heard = "no heartbeat for 2.5 s; it was last heard in step 4, one_is_killed (test_guard.py:"
        assert f"rank 1 is gone or stopped: {heard}" in end.said
        assert re.search("this rank was in step 4, where it got .*[Cc]onnection", end.said)
        assert "most recent call first" in end.said


def test_a_killed_host_is_named():
    ends = run(the_host_is_killed, 3)
    assert [end.code for end in ends] == [-signal.SIGKILL, 1, 1]
    for end in ends[1:]:
        assert (
            "the process that hosts the store (rank 0, or torchrun on its host) is gone; this rank was in step 4"
            in end.said
        )


def test_a_sleeping_rank_is_told_from_those_that_wait_for_it():
    ends = run(one_sleeps, 3)
    assert [end.code for end in ends] == [1, 1, 1]
    for end in ends:
        assert re.search(
            r"rank 1 hangs: no progress for [3-9]\.\d s, rank 1 in step 5, one_sleeps \(test_guard.py:", end.said
        )
        assert re.search(r"; ranks 0, 2 in step 5, all_reduce \(.* called by together \(test_guard.py:", end.said)
        assert "most recent call first" in end.said


def test_a_rank_in_an_earlier_phase_is_the_one_that_hangs():
    for end in run(one_is_behind, 2):
        assert end.code == 1
        assert "rank 1 hangs: no progress" in end.said
        assert "; rank 0 in step 5: forward" in end.said


def test_a_rank_that_ends_before_the_others_is_named():
    for end in run(one_ends_early, 3):
        assert end.code == 1
        assert re.search("rank 1 ended before the others: no progress for .* ranks 0, 2 in step 7", end.said)


def test_a_rank_without_pythons_lock_ends_too():
    ends = run(one_keeps_the_lock, 2)
    assert [end.code for end in ends] == [1, 1]
    assert re.search(r"rank 1 (is gone or stopped|gave no sign of life).* in step 8", ends[0].said)
    assert "one_keeps_the_lock" in ends[1].said  # its stack, written by C


def test_a_failed_rank_that_does_not_end_is_ended():
    ends = run(one_will_not_end, 2)
    assert [end.code for end in ends] == [1, 1]
    assert "ValueError: first" in ends[1].said
    assert "rank 1 failed, but has not ended" in ends[1].said


def test_ranks_whose_clocks_differ_name_the_one_that_hangs():
    ends = run(clocks_are_an_hour_apart, 3)
    assert [end.code for end in ends] == [1, 1, 1]
    for end in ends:
        assert re.search(r"rank 1 hangs: no progress for [3-9]\.\d s, rank 1 in step 5, one_sleeps", end.said)


def test_a_stopped_rank_is_named():
    ends = run(one_is_stopped, 3)
    assert [end.code for end in ends] == [1, None, 1]  # it is still stopped
    for end in others(ends, 1):
        assert "rank 1 is gone or stopped: no heartbeat for 2.5 s; it was last heard in step 4" in end.said


def test_a_rank_that_is_interrupted_ends_all_as_that_does():
    ends = run(one_is_interrupted, 2)
    assert ends[0].code == 130
    assert "rank 1 was interrupted; this rank was in step 4" in ends[0].said
    assert "KeyboardInterrupt" in ends[1].said


def test_a_rank_that_never_comes_is_named():
    ends = run(one_never_comes, 3)
    assert [end.code for end in ends] == [1, 0, 1]
    for end in others(ends, 1):
        assert "ConnectionError: rank 1 of 3 did not come within 4 s (ranks 0, 2 came)" in end.said


@pytest.mark.parametrize(("scenario", "culprit"), [(one_cannot_come, 1), (the_host_cannot_come, 0)])
def test_a_rank_that_cannot_come_says_why(scenario, culprit):
    ends = run(scenario, 3)
    assert [end.code for end in ends] == [2 if rank == culprit else 1 for rank in range(3)]
    assert ends[culprit].said == "no.toml is not there"
    for end in others(ends, culprit):
        assert f"ConnectionError: rank {culprit} failed before it joined the others: no.toml is not there" in end.said


def test_ranks_that_all_cannot_come_end_at_once_and_one_says_why():
    ends = run(none_can_come, 3)
    assert [end.code for end in ends] == [2, 2, 2]
    assert [end.said for end in ends] == ["no.toml is not there", "", ""]


def test_without_its_host_nobody_waits_for_ever():
    ends = run(the_host_never_comes, 2)
    assert ends[1].code == 1
    assert re.search(
        r"rank 1 of 2 cannot reach the store at localhost:\d+ .* rank 0 hosts it\) within 4 s", ends[1].said
    )


def test_a_rank_that_fails_while_it_joins_is_named():
    ends = run(one_fails_while_it_joins, 2)
    assert [end.code for end in ends] == [1, 1]
    assert "rank 1 failed: SystemExit: its network is down; this rank was in joining the process group" in ends[0].said


def test_a_rank_that_is_killed_while_it_joins_is_named():
    ends = run(one_is_killed_while_it_joins, 2)
    assert [end.code for end in ends] == [1, -signal.SIGKILL]
    assert "rank 1 is gone or stopped: no heartbeat for 2.5 s" in ends[0].said


def test_no_alarm_when_ranks_take_their_time_and_end_at_different_times():
    for end in run(all_is_well, 3):
        assert (end.code, end.said) == (0, "")


def test_alone_it_does_nothing():
    with Watchdog() as watch:
        watch.at("step 1")
        assert [thread.name for thread in threading.enumerate() if thread.name == "watchdog"] == []
    agree({"tp": 1}, "configuration")
    with pytest.raises(ValueError, match="deadline=3 and silence=30 seconds must be longer than two heartbeats of 2 s"):
        Watchdog(deadline=3)


def disagree(rank: int, world: int) -> list[str]:
    said = []
    agree({"tp": 2, "layers": [4, 4]}, "configuration")
    pair = dist.new_group([1, 2])
    if rank in (1, 2):
        agree({"rank is 0": rank == 0}, "group", pair)
        with pytest.raises(ValueError, match="the pair differs between ranks: size is 1 on rank 1, 2 on rank 2"):
            agree({"size": rank}, "the pair", pair)
    cases = [
        ({"tp": 2, "lr": 0.1 + (rank == 2)}, "configuration"),
        ({"a": 1} | ({"b": (2, 3)} if rank else {}), "batch"),
        ({str(key): rank for key in range(7)}, "many"),
        (dict(reversed({"a": 1, "b": 2}.items())) if rank else {"a": 1, "b": 2}, "parameters"),
    ]
    for what, label in cases:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
            agree(what, label)
        said.append(str(error.value))
    return said


def test_what_differs_between_ranks_is_said_on_every_rank():
    answers = spawn(3, disagree)
    assert answers[0] == answers[1] == answers[2]
    configuration, batch, many, order = answers[0]
    assert configuration == "configuration differs between ranks: lr is 0.1 on ranks 0, 1, 1.1 on rank 2"
    assert batch == "batch differs between ranks: b is missing on rank 0, (2, 3) on ranks 1, 2"
    assert many.endswith("4 is 0 on rank 0, 1 on rank 1, 2 on rank 2; and 2 more")
    assert order == "parameters differs between ranks: in its order"


class GoneAfterAdd:
    """A store whose host ends as soon as it has counted: whoever asks it anything more gets a lost connection."""

    def __init__(self) -> None:
        self.left = 0

    def add(self, key: str, number: int) -> int:
        if self.left:
            raise dist.DistNetworkError("connection reset by peer")
        self.left += number
        return self.left

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("connection reset by peer")


def test_a_rank_that_has_left_asks_the_host_nothing_more():
    store = GoneAfterAdd()
    Board(store, rank=2, world=3).leave(patience=1)
    assert store.left == 1
