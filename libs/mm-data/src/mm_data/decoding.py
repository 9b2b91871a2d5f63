"""Clips decoded ahead by processes, in order; a file that crashes the decoder costs its own sample only.

Each process has a pipe, and clips travel through it as bytes. So neither shared memory is needed (containers often have
64 MB) nor semaphores, which lie there too; and where a process ends, its pipe does, so nobody waits for it.
"""

import contextlib
import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from mm_data.datasets import Clip, Failure, VideoDataset
from mm_data.files import shorten
from mm_data.manifest import Sample
from mm_data.transforms import to_model_range, to_uint8

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)  # how a decoder ends on a damaged file


def decode(dataset: VideoDataset, indices: Sequence[int], workers: int = 2) -> Iterator[Clip | Failure]:
    """`dataset[i]` of these indices, in their order; `workers` processes are up to two clips each ahead. 0: none.

    A sample on which the decoder crashes is a Failure. Raises ChildProcessError, naming the sample and the way out,
    where a process was ended from outside, e.g. because the machine has no more memory. Close it where it is left
    early: `with contextlib.closing(decode(…)) as clips`.
    """
    workers = min(workers, len(indices))
    if not workers:
        yield from (dataset[index] for index in indices)
        return
    idle: SimpleQueue[_Decoder] = SimpleQueue()
    decoders: list[_Decoder] = []
    for _ in range(workers):
        decoders.append(_Decoder(dataset, decoders))
        idle.put(decoders[-1])

    def work(index: int) -> dict | Failure:
        decoder = idle.get()
        try:
            return decoder.ask(index)
        finally:
            idle.put(decoder)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="mm_data decode")  # a thread waits for each process
    ahead: deque[Future] = deque()
    left = iter(indices)
    try:
        while True:
            while len(ahead) < 2 * workers and (index := next(left, None)) is not None:
                ahead.append(pool.submit(work, index))
            if not ahead:
                return
            made = ahead.popleft().result()
            yield made if isinstance(made, Failure) else _unpack(made)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for decoder in decoders:
            decoder.process.kill()
        pool.shutdown()
        for decoder in decoders:
            decoder.close()


class _Decoder:
    """A process that makes clips of a data set. `others`: all of them, of which a fork inherits the pipes."""

    def __init__(self, dataset: VideoDataset, others: "list[_Decoder]"):
        self.dataset, self.others = dataset, others
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context()
        self.connection, far = context.Pipe()
        # A pipe ends when all that hold it do: a fork must not hold those of the others, nor this end of its own.
        inherited = [one.connection for one in {self, *self.others}] if context.get_start_method() == "fork" else []
        self.process = context.Process(target=_serve, args=(self.dataset, far, inherited), daemon=True)
        self.process.start()
        far.close()

    def ask(self, index: int) -> dict | Failure:
        sample = self.dataset.samples[index]
        try:
            self.connection.send(index)
            answer = pickle.loads(self.connection.recv_bytes())  # of our own child
        except (EOFError, OSError):
            self.close()
            code = self.process.exitcode
            if -code not in CRASHES:
                raise ChildProcessError(_why_ended(sample, code)) from None
            self.start()
            name = signal.Signals(-code).name
            return Failure(sample, f"{shorten(str(sample.path), 200)} crashes the decoder ({name}): leave it out")
        if isinstance(answer, str):
            raise RuntimeError(f"while decoding {sample.id}: {answer}")
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def _why_ended(sample: Sample, code: int) -> str:
    ended = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    why = {
        -signal.SIGKILL: "the system does so where memory runs out: give fewer --data.workers, or 0 to decode in the "
        "process that encodes; or smaller clips",
        -signal.SIGBUS: "a file was cut off while it was read, or shared memory (/dev/shm) is full",
    }.get(code, "it was ended from outside")
    return (
        f"the process that decoded {shorten(sample.id)} has ended ({ended}): {why}. What was encoded is kept: the same "
        "command continues"
    )


def _serve(dataset: VideoDataset, connection: Connection, inherited: list[Connection]) -> None:
    """Answer until the one who asks is gone."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            index = connection.recv()
            try:
                answer = _pack(dataset[index])
            except Exception:
                answer = traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))


def _pack(item: Clip | Failure) -> dict | Failure:
    """A clip as bytes, as its files had it: a quarter of what goes through the pipe, and waits to be asked for."""
    if isinstance(item, Failure):
        return item
    packed = dict(item)
    for name in ("video", "source"):
        if name in item:
            packed[name] = to_uint8(item[name])
    if "source" in item and not item["source"].any():  # there is none, and this grey lies between two bytes
        del packed["source"]
    if "mask" in item:
        packed["mask"] = (item["mask"] * 255).round().byte().numpy()
    if "references" in item:
        packed["references"] = [image.numpy() for image in item["references"]]
    return packed


def _unpack(packed: dict) -> Clip:
    """The very numbers again."""
    clip = dict(packed)
    for name in ("video", "source"):
        if name in packed:
            clip[name] = to_model_range(packed[name])
    if "mask" in packed:
        clip["mask"] = torch.from_numpy(packed["mask"]).float() / 255
    if "references" in packed:
        clip["references"] = [torch.from_numpy(image) for image in packed["references"]]
    return clip
