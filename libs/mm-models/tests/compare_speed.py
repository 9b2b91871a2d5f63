"""Our training step against diffusers' on the same weights: `OMP_NUM_THREADS=1 python tests/compare_speed.py`.

CPU seconds of forward and backward (median), and MiB that the forward keeps for the backward. No test: figures for
docs/log.md.
"""

from statistics import median
from time import process_time

import torch
from conftest import randomise
from test_wan_parity import oracle

from mm_models.wan import WanConfig, WanModel

TINY = {"dim": 160, "ffn_dim": 480, "num_heads": 5, "num_layers": 4, "text_dim": 64}
CASES = [  # config, latents B C F H W, repetitions
    (TINY, (4, 16, 3, 8, 8), 15),
    (TINY, (2, 16, 3, 30, 30), 7),
    (TINY, (1, 16, 3, 30, 30), 9),
    ({"dim": 768, "ffn_dim": 3072, "num_heads": 12, "num_layers": 8, "text_dim": 512}, (1, 16, 5, 16, 16), 5),
]


def kept(step) -> float:
    """MiB of activations that the forward of `step` saves; parameters are not counted, shared memory once."""
    sizes, alive = {}, []

    def pack(tensor):
        alive.append(tensor)
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values()) / 2**20


def main() -> None:
    torch.set_num_threads(1)
    for fields, shape, repetitions in CASES:
        model = WanModel(WanConfig(**fields))
        randomise(model)
        other = oracle(model)
        video, t, text = torch.randn(shape), torch.rand(shape[0]) * 1000, torch.randn(shape[0], 512, fields["text_dim"])
        steps = {
            "ours": lambda m=model, x=(video, t, text): m(*x).square().mean().backward(),
            "diffusers": lambda m=other, x=(video, t, text): m(*x, return_dict=False)[0].square().mean().backward(),
        }
        seconds = {name: [] for name in steps}
        for repetition in range(repetitions + 1):
            for name, step in steps.items():
                start = process_time()
                step()
                if repetition:  # the first one warms up
                    seconds[name].append(process_time() - start)
        ours, theirs = median(seconds["ours"]), median(seconds["diffusers"])
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{size:6.1f}M {shape!s:20} ours {ours:.3f} s, diffusers {theirs:.3f} s, "
            f"ratio {ours / theirs:.3f}; kept {kept(steps['ours']):.1f} and {kept(steps['diffusers']):.1f} MiB"
        )


if __name__ == "__main__":
    main()
