"""Bytes that a layer reads and writes besides its matrix products and attention: ours, and diffusers' or transformers'.

    python docs/measure/traffic.py                    # every layer, op by op; some seconds each
    python docs/measure/traffic.py wan --compiled     # also what Inductor makes of it; half a minute more for each

Nothing is measured: layers of the released widths run forward and backward on fake tensors of the CPU. Weights are
bfloat16, as FSDP gathers them, except those that a model keeps in float32; a last line says what it costs on one device
to cast float32 masters instead. Numbers are bytes for each token and channel of the layer's width: an operation
that reads and writes a bfloat16 tensor of that size once has 4.

    eager       what `mm_parallel.estimate.kernels` counts: each input and output of each operation, once. On CUDA the
                RMS norm of ours is one kernel, at which this does not look.
    compiled    the sizes that Inductor itself gives to inputs and outputs of its fused kernels for a CPU, after it has
                fused and before it writes code. Triton may fuse otherwise.
    kept        what autograd holds for the backward, parameters left out
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from mm_models import build
from mm_models.layers import Sequence, cast_weights
from mm_models.qwen2_5_vl.model import Stream
from mm_parallel.estimate.kernels import KernelCounter

BF16 = torch.bfloat16


@dataclass
class Layer:
    """A layer with the arguments of one call."""

    block: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    size: int
    """Tokens times width."""

    def run(self) -> list[Tensor]:
        """What it computes."""
        leaves = tree_leaves(self.block(*self.args, **self.kwargs))
        return [x for x in leaves if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf]


class _Reached(Exception):
    pass


def catch(block: nn.Module, run: Callable[[], Any], size: int) -> Layer:
    """The arguments of the first call of `block` in `run`, cut off from what made them."""
    seen = {}

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["call"] = tree_map(_cut, (args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    except _Reached:
        handle.remove()
    return Layer(block, *seen["call"], size)


def _cut(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def materialise(model: nn.Module) -> nn.Module:
    """A model of the meta device, with fake tensors of the CPU for parameters and buffers."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, x in table.items():
                if x is not None:
                    empty = torch.empty(x.shape, dtype=x.dtype)
                    table[name] = nn.Parameter(empty) if isinstance(x, nn.Parameter) else empty
    return model


def released(name: str, dtype: torch.dtype, **fields: Any) -> nn.Module:
    model = cast_weights(build(name, "meta", **fields), dtype)
    model.compute_dtype = BF16
    return materialise(model)


def cast_theirs(model: nn.Module) -> nn.Module:
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(BF16)
    return materialise(model)


# Layers: of ours in a dtype of weights, or of the others

ONE = {"num_layers": 1, "vision_layers": 1, "full_attention_layers": (0,)}


def wan(ours: bool, dtype: torch.dtype = BF16) -> Layer:
    video, text = torch.empty(1, 16, 21, 60, 104, dtype=BF16), torch.empty(1, 512, 4096, dtype=BF16)
    t, size = torch.empty(1), 21 * 30 * 52 * 1536
    if ours:
        model = released("wan2.1-t2v-1.3b", dtype, num_layers=1)
        return catch(model.blocks[0], lambda: model(video, t, text), size)
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        other = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=1)
    other = cast_theirs(other)
    return catch(other.blocks[0], lambda: other(video, t, text), size)


def opensoraplan(ours: bool, dtype: torch.dtype = BF16) -> Layer:
    video, text = torch.empty(1, 4, 24, 60, 80, dtype=BF16), torch.empty(1, 512, 4096, dtype=BF16)
    t, size = torch.empty(1), 24 * 30 * 40 * 2304
    model = released("opensoraplan-1.2", dtype, num_layers=1)
    if ours:
        return catch(model.transformer_blocks[0], lambda: model(video, t, text), size)
    from diffusers import AllegroTransformer3DModel

    c, grid = model.config, (24, 30, 40)
    with torch.device("meta"):
        other = AllegroTransformer3DModel(
            num_attention_heads=c.num_heads,
            attention_head_dim=c.head_dim,
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            num_layers=1,
            cross_attention_dim=c.dim,
            caption_channels=c.text_dim,
        )
    other = cast_theirs(other)
    tables = tuple((torch.empty(n, c.head_dim // 3), torch.empty(n, c.head_dim // 3)) for n in grid)
    places = tuple(torch.empty(1, 24 * 30 * 40, dtype=torch.int64) for _ in grid)
    given = {"attention_mask": None, "encoder_attention_mask": None, "image_rotary_emb": (tables, places)}
    return catch(other.transformer_blocks[0], lambda: other(video, text, t, **given), size)


def qwen(ours: bool, dtype: torch.dtype = BF16) -> Layer:
    tokens = 4096
    model = released(
        "qwen2.5-vl-3b", dtype, num_layers=1, vision_layers=1, full_attention_layers=(0,), vocab_size=152000
    )
    c = model.config
    size = tokens * c.dim
    x, table = torch.empty(1, tokens, c.dim, dtype=BF16, requires_grad=True), torch.empty(1, tokens, c.head_dim)
    if ours:
        stream = Stream(x, torch.empty(2, 1, tokens, c.head_dim // 2), Sequence(tokens, causal=True))
        return Layer(model.layers[0], (stream, model.core), {}, size)
    block = theirs(c).model.language_model.layers[0]
    return Layer(block, (x,), {"position_embeddings": (table.to(BF16), table.to(BF16))}, size)


def qwen_tower(ours: bool, dtype: torch.dtype = BF16) -> Layer:
    """A layer that sees whole frames, of one image."""
    rows = 64
    model = released(
        "qwen2.5-vl-3b", dtype, num_layers=1, vision_layers=1, full_attention_layers=(0,), vocab_size=152000
    )
    c = model.config
    size = rows * rows * c.vision_dim
    if ours:
        pixels = torch.empty(rows * rows, c.patch_dim, dtype=BF16)
        return catch(model.visual.blocks[0], lambda: model.visual(pixels, ((1, rows, rows),)), size)
    x, table = torch.empty(rows * rows, c.vision_dim, dtype=BF16, requires_grad=True), torch.empty(rows**2, 80)
    block = theirs(c).model.visual.blocks[0]
    ends = np.array([0, rows * rows])  # numbers, as lengths are read from it
    return Layer(block, (x,), {"cu_seqlens": ends, "position_embeddings": (table, table)}, size)


def theirs(config: Any) -> nn.Module:
    from qwen_step import transformers_model

    with torch.device("meta"):
        model = transformers_model(config)
    return cast_theirs(model)


LAYERS: dict[str, Callable[..., Layer]] = {
    "wan2.1-t2v-1.3b, 32,760 tokens, against diffusers": wan,
    "opensoraplan-1.2, 28,800 tokens, against diffusers' Allegro": opensoraplan,
    "qwen2.5-vl-3b, 4,096 tokens, against transformers": qwen,
    "qwen2.5-vl-3b's tower, 4,096 patches, against transformers": qwen_tower,
}


# Counting


@dataclass
class Traffic:
    """Of a layer. Bytes for each token and channel."""

    forward: Counter[str]
    backward: Counter[str]
    kept: float

    @property
    def whole(self) -> float:
        return self.forward.total() + self.backward.total()


def count(layer: Layer) -> Traffic:
    kept: dict[int, int] = {}
    known = {id(x.untyped_storage()) for x in layer.block.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if id(storage) not in known:
            kept[id(storage)] = storage.nbytes()
        return x

    with KernelCounter() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outs = layer.run()
    with KernelCounter() as backward:
        torch.autograd.backward(outs, [torch.empty_like(x) for x in outs])
    return Traffic(*(add_up(c, layer.size) for c in (forward, backward)), sum(kept.values()) / layer.size)


def add_up(counter: KernelCounter, size: int) -> Counter[str]:
    sums: Counter[str] = Counter()
    for kernel in counter.kernels:
        if kernel.kind == "memory":
            sums[kernel.op.removeprefix("aten.")] += kernel.bytes / size
    return sums


def count_compiled(layer: Layer) -> tuple[float, float]:
    """Forward and backward, of the kernels that Inductor writes itself."""
    found = [0, 0]

    def plan(graph: Any) -> SimpleNamespace:
        """In place of writing and compiling code: what is fused with what."""
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if not node.is_extern():
                found[graph.is_backward] += node.get_read_write_buffers_sizes()
        return SimpleNamespace(call=None, runner=None, __file__="")

    def backend(graph: Any, inputs: list[Any]) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        compile_fx(graph, inputs)
        return graph.forward  # which runs on fake tensors

    with (
        compiling(),
        patch("torch._inductor.graph.GraphLowering.compile_to_module", plan),
    ):
        torch.compile(layer.run, backend=backend, fullgraph=True)()
    return found[0] / layer.size, found[1] / layer.size


@contextmanager
def compiling() -> Any:
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()
    with (
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        yield


def show(name: str, make: Callable[..., Layer], compiled: bool) -> None:
    a, b, masters = count(make(True)), count(make(False)), count(make(True, torch.float32))
    print(f"{name}\n")
    print(f"{'bytes for each token and channel':34}{'ours':>22}{'theirs':>22}")
    print(f"{'':34}{'forward':>11}{'backward':>11}{'forward':>11}{'backward':>11}")
    sums = a.forward + a.backward + b.forward + b.backward
    for op, total in sums.most_common():
        if total >= 0.05:
            numbers = (x[op] for x in (a.forward, a.backward, b.forward, b.backward))
            print(f"{op:34}" + "".join(f"{x:11.1f}" for x in numbers))
    totals = (x.total() for x in (a.forward, a.backward, b.forward, b.backward))
    print(f"{'eager':34}" + "".join(f"{x:11.1f}" for x in totals) + f"   ratio {a.whole / b.whole:.2f}")
    if compiled:
        x = count_compiled(make(True))
        try:
            y = count_compiled(make(False))
        except DataDependentOutputException:
            y = (nan, nan)  # it reads numbers from the device, so it is not one graph
        print(f"{'compiled':34}" + "".join(f"{n:11.1f}" for n in (*x, *y)) + f"   ratio {sum(x) / sum(y):.2f}")
    print(f"{'kept for the backward':34}{a.kept:11.1f}{'':11}{b.kept:11.1f}{'':11}   ratio {a.kept / b.kept:.2f}")
    more = (masters.forward.total() - a.forward.total(), masters.backward.total() - a.backward.total())
    print(f"{'more with float32 masters':34}{more[0]:11.1f}{more[1]:11.1f}\n", flush=True)


def main(*words: str) -> None:
    compiled = "--compiled" in words
    words = tuple(word for word in words if not word.startswith("--"))
    for name, make in LAYERS.items():
        if all(word in name for word in words):
            with FakeTensorMode(allow_non_fake_inputs=True):
                show(name, make, compiled)


if __name__ == "__main__":
    main(*sys.argv[1:])
