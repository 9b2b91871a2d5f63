"""Cutting a model that is not ours: transformers' Llama, by a plan written here.

    python docs/examples/cut_llama.py
    torchrun --nproc_per_node 4 docs/examples/cut_llama.py --tp 2 --ring 2
    torchrun --nproc_per_node 4 docs/examples/cut_llama.py --pp_layers 1 3 --ulysses 2

print the same losses. FSDP, tensor parallelism and recompute need no more than the plan; for context and pipeline
parallelism the model also has to be a ladder, which here is the forty lines of a subclass: no weight changes its name.
"""

import argparse
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from mm_parallel import (
    MemoryConfig,
    ParallelConfig,
    ParallelPlan,
    Pipeline,
    clip_grad_norm,
    data_rank,
    finish_gradients,
    forward_backward,
    make_mesh,
    parallelize,
)
from mm_parallel.device import device, init_distributed, leave
from mm_parallel.mesh import reports_loss, size
from mm_parallel.plan import Sequence

PLAN = ParallelPlan(
    layers=("model.layers.*",),
    last=("model.norm", "lm_head"),
    tokens={"x": 1, "cos": 1, "sin": 1},
    heads=4,
    columns=tuple(
        f"model.layers.*.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    ),
    rows=("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"),
)


class Stream(NamedTuple):
    x: Tensor  # B L D
    cos: Tensor  # 1 L h
    sin: Tensor
    sequence: Sequence


def seam(module, q: Tensor, k: Tensor, v: Tensor, mask, core, sequence: Sequence, **_) -> tuple[Tensor, None]:
    """transformers calls this with B H L h; whoever cuts the tokens takes B L H h, and fewer heads of k and v."""
    return core(*(x.transpose(1, 2) for x in (q, k, v)), sequence), None


def attention(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=sequence.causal, enable_gqa=True).transpose(1, 2)


class Llama(LlamaForCausalLM):
    """The same modules, called as a ladder."""

    def __init__(self, config: LlamaConfig) -> None:
        AttentionInterface.register("seam", seam)
        config._attn_implementation = "seam"
        super().__init__(config)
        self.split = self.gather = lambda x, *_: x
        self.core = attention

    @property
    def layers(self):
        return self.model.layers

    def stem(self, input_ids: Tensor) -> Stream:
        x = self.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.split(Stream(x, *self.model.rotary_emb(x, positions), Sequence(input_ids.shape[1], causal=True)))

    def layer(self, i: int, stream: Stream) -> Stream:
        positions = (stream.cos, stream.sin)
        return stream._replace(
            x=self.layers[i](stream.x, position_embeddings=positions, core=self.core, sequence=stream.sequence)
        )

    def head(self, stream: Stream) -> Tensor:
        return self.gather(self.lm_head(self.model.norm(stream.x)), stream.sequence)

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.stem(input_ids)
        for i in range(len(self.layers)):
            stream = self.layer(i, stream)
        return self.head(stream)


def train(parallel: ParallelConfig, memory: MemoryConfig, steps: int = 3) -> list[float]:
    """Losses of a few steps on random text: a global batch of 8 texts of 13 tokens, in micro-batches of 2."""
    mesh = make_mesh(parallel, device().type)
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
    model = Llama(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).double()
    texts = torch.randint(32, (8, 13)).to(device())

    cut = (PLAN, mesh, parallel, memory)
    run = Pipeline(model, *cut) if size(mesh, "pp") > 1 else parallelize(model, *cut)
    model.to(device())
    index, parts = data_rank(mesh)
    mine = texts.chunk(parts)[index].split(2)
    groups: dict = {}
    for parameter in model.parameters():
        groups.setdefault((type(parameter), getattr(parameter, "placements", None)), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups.values()], lr=1e-2)

    total = texts[:, 1:].numel()  # every token but the first of each text is a label

    def losses(output: Tensor, number: int) -> Tensor:
        """Of every label token: B L-1."""
        return F.cross_entropy(output[:, :-1].transpose(1, 2), mine[number][:, 1:], reduction="none")

    means = []
    for _ in range(steps):
        own = forward_backward(run, len(mine), lambda number: {"input_ids": mine[number]}, losses, total, mesh)
        finish_gradients(model, mesh)
        clip_grad_norm(model, 1.0, mesh)
        optimizer.step()
        optimizer.zero_grad()
        summed = torch.cat(own).sum() if own and reports_loss(mesh) else torch.zeros((), dtype=torch.float64)
        if mesh is not None:
            dist.all_reduce(summed)
        means.append(summed.item() / total)
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pp_layers", type=int, nargs="*", default=())
    for name in ("dp_replicate", "ulysses", "ring", "tp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    arguments = vars(parser.parse_args())
    arguments["pp_layers"] = tuple(arguments["pp_layers"])
    rank, world, _ = init_distributed()
    losses = train(ParallelConfig(**arguments), MemoryConfig(recompute="full"))
    if rank == 0:
        print(f"{world} ranks: losses {', '.join(f'{loss:.6f}' for loss in losses)}")
    leave()
