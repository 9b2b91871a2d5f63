"""Clips from other processes: the same clips in the same order, whatever a file or the machine does to them."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from mm_data import Control, Failure, Geometry, Sample, VideoDataset, decode, write_video

GEOMETRY = Geometry(num_frames=5, max_height=32, max_width=48, window="start")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    made = []
    for number in range(5):
        colours = np.random.default_rng(number).integers(0, 255, (9, 1, 1, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", colours.repeat(32, axis=1).repeat(48, axis=2), fps=8)
        made.append(Sample(f"{number}.mp4", folder / f"{number}.mp4", (f"clip {number}",)))
    (folder / "damaged.mp4").write_bytes(b"no video")
    made.insert(2, Sample("damaged.mp4", folder / "damaged.mp4", ("x",)))
    one, other, last = (sample.path for sample in made if sample.id in ("0.mp4", "1.mp4", "4.mp4"))
    return [*made, Sample("vace", one, ("y",), control=Control(other, last)), Sample("bare", one, control=Control())]


class Ended(VideoDataset):
    """Ends the process that decodes the samples of these ids by a signal."""

    ends: dict[str, signal.Signals]

    def _decode(self, sample):
        if sample.id in self.ends:
            faulthandler.disable()  # pytest's, which would print much
            os.kill(os.getpid(), self.ends[sample.id])
        return super()._decode(sample)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_clips_are_those_of_the_data_set_in_order(samples, workers):
    dataset = VideoDataset(samples, GEOMETRY, on_error="return")
    order = [7, 1, 2, 0, 6, 3]
    found = list(decode(dataset, order, workers))
    assert [item.sample.id if isinstance(item, Failure) else item["id"] for item in found] == [
        samples[index].id for index in order
    ]
    for index, item in zip(order, found, strict=True):
        expected = dataset[index]
        if isinstance(expected, Failure):
            assert item == expected
            continue
        if workers and not expected.get("source", torch.ones(1)).any():
            del expected["source"]  # there is none: the encoder knows
        assert item.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(item[name], value) if isinstance(value, torch.Tensor) else item[name] == value


def test_a_file_that_crashes_the_decoder_costs_its_own_sample(samples):
    dataset = Ended(samples[:5], GEOMETRY, on_error="return")
    dataset.ends = {"0.mp4": signal.SIGSEGV, "3.mp4": signal.SIGABRT}
    first, *found = decode(dataset, range(5), workers=1)
    assert first.sample.id == "0.mp4"
    assert "0.mp4 crashes the decoder (SIGSEGV)" in first.reason
    assert [isinstance(item, Failure) for item in found] == [False, True, False, True]


def test_a_process_that_is_killed_ends_it_with_the_reason(samples):
    dataset = Ended(samples[:5], GEOMETRY, on_error="return")
    dataset.ends = {"1.mp4": signal.SIGKILL}
    with closing(decode(dataset, range(5), workers=2)) as decoded:
        assert next(decoded)["id"] == "0.mp4"
        with pytest.raises(ChildProcessError, match=r"decoded 1\.mp4 has ended \(signal SIGKILL\): .*--data\.workers"):
            next(decoded)


def test_it_can_be_left_early(samples):
    with closing(decode(VideoDataset(samples, GEOMETRY, on_error="return"), range(6), workers=2)) as decoded:
        assert next(decoded)["id"] == "0.mp4"
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


WITHOUT_FILES = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file can grow: nor can shared memory, whose files these are
from pathlib import Path
from mm_data import Geometry, Sample, VideoDataset, decode
samples = [Sample(path, Path(path)) for path in sys.argv[1:]]
dataset = VideoDataset(samples, Geometry(num_frames=5, max_height=32, max_width=48), on_error="return")
print(*(clip["id"] for clip in decode(dataset, range(len(samples)), 2)))
"""


def test_no_shared_memory_is_needed(samples):
    paths = [str(sample.path) for sample in samples[:2]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FILES, *paths], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == paths


def test_whatever_a_file_raises_is_its_failure_and_what_is_ours_is_not(samples, tmp_path):
    unknown = tmp_path / "unknown.mp4"
    unknown.write_bytes(samples[0].path.read_bytes().replace(b"avc1", b"zz~1"))  # no codec is called so
    (failure,) = decode(VideoDataset([Sample("u", unknown)], GEOMETRY, on_error="return"), [0], 1)
    assert "unknown.mp4" in failure.reason

    class Wrong(VideoDataset):
        def _decode(self, sample):
            raise AssertionError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(decode(Wrong(samples[:1], GEOMETRY, on_error="return"), [0], 1))
    with pytest.raises(ValueError, match=r"sample 0\.mp4: "):
        VideoDataset([replace(samples[0], path=unknown)], GEOMETRY)[0]
