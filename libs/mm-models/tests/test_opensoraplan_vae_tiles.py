"""Tiles: which are cut, how they meet, and how much is held at once."""

from weakref import finalize

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm_models.opensoraplan import tiles
from mm_models.opensoraplan.testing_vae import write_vae
from mm_models.opensoraplan.tiles import TILES, Tiles, windows
from mm_models.opensoraplan.vae import OpenSoraPlanVAE
from mm_models.opensoraplan.vae_config import VAEConfig
from mm_models.opensoraplan.vae_model import CausalVAE

SMALL = Tiles(pixels=64, frames=9, latents=8, latent_frames=3)


def shrink(video: Tensor) -> Tensor:
    """In the place of an encoder: means over 8x8 pixels, of the first frame and of each four frames after it."""
    frames = torch.cat([video[:, :, :1].repeat_interleave(3, 2), video], 2)
    return F.avg_pool3d(frames, (4, 8, 8))


def grow(latents: Tensor) -> Tensor:
    """In the place of a decoder: 8x8 pixels alike, of the first latent one frame and of each other four."""
    return latents.repeat_interleave(4, 2)[:, :, 3:].repeat_interleave(8, 3).repeat_interleave(8, 4)


class Seen:
    """What a function is called with, in order."""

    def __init__(self, function) -> None:
        self.function, self.shapes = function, []

    def __call__(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape[2:]))
        return self.function(x)


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


# --- what is cut


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (1, 29, [(0, 1)]),
        (29, 29, [(0, 29)]),
        (33, 29, [(0, 29), (28, 33)]),
        (57, 29, [(0, 29), (28, 57)]),
        (93, 29, [(0, 29), (28, 57), (56, 85), (84, 93)]),
        (93, 33, [(0, 33), (32, 65), (64, 93)]),
        (24, 8, [(0, 8), (7, 15), (14, 22), (21, 24)]),
        (24, 16, [(0, 16), (15, 24)]),
    ],
)
def test_windows_share_one_frame(length, size, expected):
    assert list(windows(length, size)) == expected


@pytest.mark.parametrize(
    ("kind", "times", "rows", "columns"),
    [
        # rows begin every 448 pixels, so 480 of them are cut into 480 and a strip of 32: the makers do that, too
        ("inference", [29, 29, 29, 9], [480, 32], [512, 192]),
        ("training", [33, 33, 29], [256, 256, 32], [256, 256, 192]),
    ],
)
def test_what_is_cut_of_a_video(kind, times, rows, columns):
    run = Seen(lambda x: shrink(x.new_zeros(x.shape)))
    video = torch.zeros(1, 1, 1, 1, 1).expand(1, 1, 93, 480, 640)
    assert tiles.encode(run, video, TILES[kind]).shape == (1, 1, 24, 60, 80)
    assert run.shapes == [(t, h, w) for t in times for h in rows for w in columns]


@pytest.mark.parametrize(
    ("kind", "times", "rows", "columns"),
    [
        ("inference", [8, 8, 8, 3], [60, 4], [64, 24]),
        ("training", [16, 9], [32, 32, 4], [32, 32, 24]),
    ],
)
def test_what_is_cut_of_latents(kind, times, rows, columns):
    run = Seen(grow)
    assert tiles.decode(run, torch.zeros(1, 1, 24, 60, 80), TILES[kind]).shape == (1, 1, 93, 480, 640)
    assert run.shapes == [(t, h, w) for t in times for h in rows for w in columns]


@pytest.mark.parametrize("shape", [(9, 64, 64), (1, 8, 64), (5, 56, 40)])
def test_what_is_no_larger_than_a_tile_goes_whole(shape):
    run = Seen(shrink)
    tiles.encode(run, torch.zeros(1, 3, *shape), SMALL)
    assert run.shapes == [shape]
    frames, height, width = shape
    run = Seen(grow)
    tiles.decode(run, torch.zeros(1, 4, (frames + 3) // 4, height // 8, width // 8), SMALL)
    assert len(run.shapes) == 1


def test_the_tiles_of_the_makers():
    assert TILES == {"inference": (512, 29, 64, 8), "training": (256, 33, 32, 16)}


# --- how they meet


@pytest.mark.parametrize(
    "shape",
    [(17, 128, 128), (13, 64, 64), (9, 72, 64), (1, 64, 136), (33, 88, 200), (5, 56, 296), (21, 120, 112)],
)
def test_tiles_lie_where_they_belong(shape):
    """Of functions that look at nothing beyond a tile, tiles agree where they overlap: so cutting changes nothing."""
    video = draw(2, 3, *shape)
    torch.testing.assert_close(tiles.encode(shrink, video, SMALL), shrink(video))
    latents = shrink(video)
    torch.testing.assert_close(tiles.decode(grow, latents, SMALL), grow(latents))


def test_tiles_fade_into_one_another():
    """Tiles of one number each: 1, 2 over 3, 4. The overlap of an eighth goes from one to the next in equal steps."""
    numbers = iter([1.0, 2.0, 3.0, 4.0])
    run = lambda x: torch.full((1, 1, x.shape[2], x.shape[3] * 8, x.shape[4] * 8), next(numbers))  # noqa: E731
    video = tiles.decode(run, torch.zeros(1, 1, 1, 14, 14), Tiles(64, 9, 8, 3))  # tiles of 8, 7 apart
    assert video.shape == (1, 1, 1, 112, 112)
    plane, fade = video[0, 0, 0], torch.arange(8) / 8
    assert torch.equal(plane[:56, :56], torch.full((56, 56), 1.0))
    assert torch.equal(plane[0, 56:64], 1 + fade)
    assert torch.equal(plane[:56, 64:], torch.full((56, 48), 2.0))
    assert torch.equal(plane[56:64, 0], 1 + 2 * fade)
    assert torch.equal(plane[64:, :56], torch.full((48, 56), 3.0))
    # where four meet, the last fades out of the one above, then out of the one to its left; both have faded already
    across, down = 1 + fade, (1 + 2 * fade)[:, None]
    last = across * (1 - fade)[:, None] + 4 * fade[:, None]
    torch.testing.assert_close(plane[56:64, 56:64], down * (1 - fade) + last * fade)
    assert torch.equal(plane[64:, 64:], torch.full((48, 48), 4.0))


def test_a_window_adds_what_comes_after_its_first_frame():
    numbers = iter([1.0, 2.0, 3.0])
    run = lambda x: torch.full((1, 1, (x.shape[2] + 3) // 4, 2, 2), next(numbers))  # noqa: E731
    latents = tiles.encode(run, torch.zeros(1, 3, 21, 16, 16), SMALL)
    assert latents[0, 0, :, 0, 0].tolist() == [1, 1, 1, 2, 2, 3]


# --- the VAE in them


@pytest.fixture
def codecs(tmp_path, monkeypatch):
    """Whole, and in small tiles."""
    monkeypatch.setitem(TILES, "inference", SMALL)
    write_vae(tmp_path / "vae")
    return OpenSoraPlanVAE(tmp_path), OpenSoraPlanVAE(tmp_path, tiling="inference")


def smooth(frames: int, height: int, width: int) -> Tensor:
    """A video in which something moves, 1 3 F H W."""
    coarse = draw(1, 3, (frames + 3) // 4 + 1, height // 8 + 1, width // 8 + 1)
    return F.interpolate(coarse, (frames, height, width), mode="trilinear")


def test_one_tile_is_the_whole(codecs):
    whole, cut = codecs
    video = smooth(9, 64, 64)
    latents = whole.encode(video)
    assert torch.equal(cut.encode(video), latents)
    assert torch.equal(cut.decode(latents), whole.decode(latents))


def seams(video: Tensor) -> float:
    """The largest mean step over a seam between rows or columns, as a multiple of that between any two."""
    found = []
    for dim in (3, 4):
        steps = video.diff(dim=dim).abs().transpose(0, dim).flatten(1).mean(1)
        found += [(steps[at - 1] / steps.mean()).item() for at in range(56, video.shape[dim], 56)]
    return max(found)


@pytest.mark.parametrize("shape", [(13, 72, 120), (1, 72, 264)])
def test_seams_are_hardly_larger_than_any_other_step(codecs, monkeypatch, shape):
    """Norms see other numbers in each tile, so tiles differ from the whole; but nowhere is there an edge."""
    whole, cut = codecs
    video = smooth(*shape)
    latents = whole.encode(video)
    assert cut.encode(video).shape == latents.shape
    assert not torch.equal(cut.encode(video), latents)
    found = cut.decode(latents)
    assert found.shape == video.shape
    monkeypatch.setattr(tiles, "_fade", lambda *_, **__: None)
    assert seams(found) < 1.5
    assert seams(cut.decode(latents)) > seams(found) + 0.2  # otherwise this test says nothing


# --- how much is held at once


def storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive. On the meta device they have a size, and take no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given | self.known:  # no view
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def free(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def measure(run, *args) -> float:
    """GB that are held at once, besides what was there before."""
    with torch.no_grad(), Held() as held:
        run(*args)
    return held.most / 1e9


@pytest.fixture(scope="module")
def released():
    """The released VAE, without memory."""
    with torch.device("meta"):
        return CausalVAE(VAEConfig())


def test_a_long_video_takes_the_memory_of_one_tile(released):
    """Of 93 frames of 480x640 a quarter of what the whole takes. `pytest -s` says how much."""
    size = TILES["inference"]
    video = torch.empty(1, 3, 93, 480, 640, device="meta")
    latents = torch.empty(1, 4, 24, 60, 80, device="meta")
    tile = measure(released.moments, video[:, :, : size.frames, : size.pixels, : size.pixels])
    found, whole = measure(tiles.encode, released.moments, video, size), measure(released.moments, video)
    print(f"encode: whole {whole:.2f} GB, in tiles {found:.2f} GB, one tile {tile:.2f} GB")
    assert found < tile * 1.01
    assert found < whole / 3

    tile = measure(released.decode, latents[:, :, : size.latent_frames, : size.latents, : size.latents])
    found, whole = measure(tiles.decode, released.decode, latents, size), measure(released.decode, latents)
    print(f"decode: whole {whole:.2f} GB, in tiles {found:.2f} GB, one tile {tile:.2f} GB")
    assert found < tile * 1.01 + 2 * 4 * video.numel() / 1e9  # the video itself, and the tile before
    assert found < whole / 3


def test_what_is_counted_is_there(codecs):
    """The same with tensors that have memory."""
    whole, cut = codecs
    video = smooth(17, 64, 120)
    assert measure(whole.encode, video) > 2 * measure(cut.encode, video)
    latents = whole.encode(video)
    assert measure(whole.decode, latents) > 2 * measure(cut.decode, latents)
    held = Held()
    with held:
        kept = torch.zeros(1000)
        kept + 1
    assert (held.now, held.most) == (4000, 8000)
