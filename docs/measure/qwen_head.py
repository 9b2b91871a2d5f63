"""The head of a language model: memory and time of full logits, of torch's chunks, and of ours.

    python docs/measure/qwen_head.py            # 2048 tokens, a vocabulary of 151,936 / 8, 256 channels

Peak: bytes of what was made in forward and backward, its results included, on top of what was there before. Half of
the tokens have a label. Extrapolated to 32k tokens and a vocabulary of 151,936 with 2048 channels, as Qwen2.5-VL 3B.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_models.tokens import IGNORED, token_losses
from mm_parallel.estimate.peak import PeakMemory

TOKENS, VOCABULARY, DIM, SHARE = 2048, 151_936 // 8, 256, 0.5
WHOLE = 32_768, 151_936, 2048
CHUNK = (256, 2048)  # as large a part of these rows and entries as the default is of 32k label rows


def full(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (x @ weight.to(x.dtype).T).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def torchs(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """On the label rows alone, as ours."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK[0])
    rows = (labels.flatten() != IGNORED).nonzero()[:, 0]
    some, wanted = x.flatten(0, 1).index_select(0, rows), labels.flatten()[rows]
    losses = F.linear_cross_entropy(some, weight.to(x.dtype), wanted, reduction="none", options=options)
    return losses.new_zeros(labels.numel()).index_put((rows,), losses)


def ours(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return token_losses(x, weight, labels, chunk=CHUNK)


def main() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (1, TOKENS))
    labels[0, torch.rand(TOKENS) >= SHARE] = IGNORED
    weight = (torch.randn(VOCABULARY, DIM) / DIM**0.5).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, TOKENS, DIM, dtype=dtype, requires_grad=True)
        exact = full(x.detach().double(), weight.detach().to(dtype).double(), labels).flatten()
        print(f"{TOKENS} tokens, half with a label, vocabulary {VOCABULARY}, {DIM} channels, x in {dtype}")
        for losses in (full, torchs, ours):
            seconds = []
            for _ in range(3):
                x.grad = weight.grad = None
                started = time.perf_counter()
                found = losses(x, weight, labels)
                found.sum().backward()
                seconds.append(time.perf_counter() - started)
            error = (found.detach().flatten().double() - exact).abs().max()
            x.grad = weight.grad = None
            with PeakMemory() as memory:
                losses(x, weight, labels).sum().backward()
            print(
                f"  {losses.__name__:7} peak {memory.peak / 2**20:6.1f} MiB, {min(seconds):5.2f} s, losses in "
                f"{found.dtype}, off by {error:.1e}"
            )
    tokens, vocabulary, dim = WHOLE
    gib = 2**30
    print(
        f"{tokens} tokens x {vocabulary}: logits in float32 {4 * tokens * vocabulary / gib:.1f} GiB, and as much again "
        f"for their gradient; ours: blocks of {4 * 2048 * 16384 / gib:.2f} GiB, two at a time, besides the gradients "
        f"of the weight ({4 * vocabulary * dim / gib:.2f} GiB in float32) and of x ({2 * tokens * dim / gib:.2f} GiB)"
    )


if __name__ == "__main__":
    main()
