"""What several families share: layers that follow the dtype of their input.

Parameters may be float32 masters while the matrix products run in bfloat16. No autocast is needed: every layer here
computes in the dtype of its *input*, casting its parameters on the fly, and what must not lose precision (norms,
modulation, the residual stream) is kept in at least float32 by calling `wide`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is float64 already (so that tests can run a whole model in float64)."""
    return x if x.dtype == torch.float64 else x.float()


class Linear(nn.Linear):
    """`nn.Linear` in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` computed in at least float32, returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        weight = None if self.weight is None else self.weight.to(y.dtype)
        bias = None if self.bias is None else self.bias.to(y.dtype)
        return F.layer_norm(y, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of squares of x + eps) · weight: at least float32, rounded once, to the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # a kernel of its own, which keeps as little
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """It keeps x and a number for each row, where autograd would keep two more float32 tensors of the size of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return _cast(_multiply(x * scale, weight.to(x.dtype)), x.dtype)  # masters give what rounded weights give

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With y = x · scale, products over channels <,>: scale · (grad · weight - y · <grad · weight, y> / D)."""
        x, weight, scale = ctx.saved_tensors
        rounded = weight.to(x.dtype).to(scale.dtype)
        of_x = grad * scale
        of_weight = of_x * x  # of each token
        shared = (of_weight @ rounded).unsqueeze(-1) / x.shape[-1]
        of_x = of_x.mul_(rounded).addcmul_(x, shared * scale.square(), value=-1).to(x.dtype)
        return of_x, of_weight.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None


# Dynamo of torch 2.11 loses the backward of a function, silently, where the last operation of its forward returns what
# it was given: an operation in place, or a cast to the dtype that is there already. So forwards end in these.


def _multiply(x: Tensor, y: Tensor) -> Tensor:
    """x · y, in the memory of x where that is of use."""
    return x * y if torch.compiler.is_compiling() else x.mul_(y)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """Turns pairs of channels: (a, b) -> (a · cos - b · sin, b · cos + a · sin), at least float32, rounded once.

    x: … h. `shape` is what h is unflattened to, and `dim` (negative) where a and b then lie, without which cos and sin
    have the shape of what they turn: for the halves of h, shape (2, -1) and dim -2; for neighbours, (-1, 2) and -1.
    """
    return _Rotate.apply(x, cos, sin, shape, dim)


class _Rotate(torch.autograd.Function):
    """It keeps the tables alone, and its backward turns back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.dim = shape, dim
        return _turn(x, cos, sin, shape, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.shape, ctx.dim), None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    pairs = x.unflatten(-1, shape)
    turned = pairs * torch.stack((cos, cos), dim)
    if torch.compiler.is_compiling():  # where a change in place would be written out
        turned = turned + pairs.flip(dim) * torch.stack((-sin, sin), dim)
    else:  # where what is flipped would be a copy
        (a, b), (c, d) = pairs.unbind(dim), turned.unbind(dim)
        c.addcmul_(b, sin, value=-1)
        d.addcmul_(a, sin)
    return _cast(turned.flatten(-len(shape)), x.dtype)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t·10000^(-i/(dim/2)) for t in 0..1000, any shape: adds a last dim, float32 and accurate to 1e-7.

    The plain product in float32 would be off by 3e-5. So t is split into a whole number and a rest, the frequency into
    its leading 14 bits and a rest: the large part of the angle, 10 bits times 14 bits, is then exact in 24 bits.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim // 2))
    mantissa, exponent = torch.frexp(frequency)
    leading = torch.ldexp((mantissa * 2**14).round(), exponent - 14)
    rest = (frequency - leading).float().to(t.device)
    leading, frequency = leading.float().to(t.device), frequency.float().to(t.device)

    t = t.float().unsqueeze(-1)
    whole = t.round()
    large = whole * leading
    small = whole * rest + (t - whole) * frequency
    cos = large.cos() * small.cos() - large.sin() * small.sin()
    sin = large.sin() * small.cos() + large.cos() * small.sin()
    return torch.cat((cos, sin), dim=-1)


def modulate(norm: LayerNorm, x: Tensor, shift: Tensor, scale: Tensor, noisy: Tensor | None = None) -> Tensor:
    """norm(x) · (1 + scale) + shift, for a norm without weights, x B L D.

    shift, scale: B 1 D, the same for all tokens; or B L D; or B 2 D, of which a token takes the second where `noisy`
    (B L 1, zeros and ones) says so. Then nothing of the size of the tokens is made of the modulation.

    For one sample with one timestep they are weight and bias of the norm: one kernel. For several, `_Modulated`.
    """
    if noisy is not None:
        y = norm(x)
        clean, other = (torch.addcmul(shift[:, i : i + 1], y, 1 + scale[:, i : i + 1]) for i in (0, 1))
        return torch.where(noisy > 0, other, clean)
    if x.shape[0] == 1 and shift.shape[1] == 1:
        return F.layer_norm(x, norm.normalized_shape, 1 + scale[0, 0], shift[0, 0], norm.eps)
    return _Modulated.apply(x, shift, 1 + scale, norm.eps)


class _Modulated(torch.autograd.Function):
    """The norm of x over its last dim, times `scale`, plus `shift` (B 1 D or B L D).

    It keeps x and two numbers for each row, where autograd would keep the norm of x as well.
    """

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, mean, scatter = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, scale, mean, scatter)
        ctx.shape = shift.shape
        return torch.addcmul(shift, y, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, mean, scatter = ctx.saved_tensors
        of_y = (grad * scale).to(x.dtype)
        of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            of_y, x, x.shape[-1:], mean, scatter, None, None, [True, False, False]
        )
        y = torch.addcmul(-mean * scatter, x, scatter)
        return of_x, grad.sum_to_size(ctx.shape), y.mul_(grad).sum_to_size(scale.shape), None


def gated(x: Tensor, gate: Tensor, y: Tensor, noisy: Tensor | None = None) -> Tensor:
    """x + gate · y; gate and noisy as in `modulate`."""
    if noisy is not None:
        return x + torch.where(noisy > 0, gate[:, 1:] * y, gate[:, :1] * y)
    return _Gated.apply(x, gate, y)


class _Gated(torch.autograd.Function):
    """x + gate · y. Its backward makes no tensor of the size of x but the two products."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return torch.addcmul(x, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y = ctx.saved_tensors
        return grad, (grad * y).sum_to_size(gate.shape), (grad * gate).to(y.dtype)


def remake(make: Callable[..., Tensor], inputs: tuple[Tensor, ...], use: Callable[[Tensor], Tensor]) -> Tensor:
    """use(make(*inputs)), where the backward makes what `use` would keep of that tensor again, from the inputs.

    For what is quick to make and follows from tensors that are kept anyway: an activation before the linear behind it.
    `use` may be any module. Where it keeps nothing of the tensor (a frozen linear), nothing is made again; where it
    keeps it several times, it is made as often. Inductor weighs this itself: compiled, it is use(make(*inputs)).

    make: differentiable, without randomness; of its result nobody may keep anything but `use`.
    """
    made = make(*inputs)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return use(made)
    hooks = _Remaking(make, inputs, made)
    with saved_tensors_hooks(hooks.pack, hooks.unpack):
        result = use(made)
    hooks.inputs = ()  # autograd may keep `pack`
    return result


class _Remaking:
    """Hooks of saved tensors that hand all on to those around them (of a checkpoint, say), which torch would leave out.

    Only in place of what was made they hand on the inputs.
    """

    def __init__(self, make: Callable[..., Tensor], inputs: tuple[Tensor, ...], made: Tensor) -> None:
        self.make, self.inputs = make, inputs
        self.like = _describe(made)
        around = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.pack_around, self.unpack_around = around or (Tensor.detach, identity)

    def pack(self, x: Tensor) -> Any:
        if self.like is not None and _describe(x) == self.like:
            return _Recipe(x.shape, [self.pack_around(y) for y in self.inputs])
        return self.pack_around(x)

    def unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Recipe):
            return self.unpack_around(packed)
        with torch.no_grad():
            return self.make(*map(self.unpack_around, packed.inputs)).view(packed.shape)


class _Recipe(NamedTuple):
    shape: torch.Size
    inputs: list[Any]


def _describe(x: Tensor) -> tuple | None:
    """The same for two that hold the same numbers in the same memory, in whatever shape."""
    if not x.is_contiguous():
        return None
    return x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.dtype


_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of CUDA, the first that can.

torch would put cuDNN before them on an H100 and a B200. There it is wrong in some shapes (with a mask, with few heads
of keys), and takes a second for each new one. `mm_parallel` puts it into a model's seam where it pays: for long
sequences without a mask.
"""


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, as is: no dropout, scale 1/√h. q B Lq H h, k and v B Lk K h -> B Lq H h.

    K divides H: heads of keys and values that H/K neighbouring heads of queries share. Causal: token i sees 0 … i.
    mask: B Lk, bool: True for a key that is attended. A query that sees no key at all gives 0.
    Raises ValueError for a mask together with causal, and where K does not divide H.
    """
    if mask is not None and causal:
        raise ValueError(
            "causal attention with a mask of keys: there is no such kernel; pack without what is masked instead"
        )
    heads, shared = q.shape[2], k.shape[2]
    if heads != shared and (shared == 0 or heads % shared):
        raise ValueError(
            f"attention of {heads} heads of queries and {shared} of keys: neighbours share one, so the second number "
            "must divide the first"
        )
    grouped = heads != shared
    if grouped and not _groups_heads(q, mask):
        k, v = (x.repeat_interleave(heads // shared, 2) for x in (k, v))
        grouped = False
    seen = None if mask is None else mask[:, None, None]  # B 1 1 Lk: the same for all heads and queries
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_KERNELS) if q.device.type == "cuda" else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _groups_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether torch has a kernel that reads shared heads in place.

    For others `enable_gqa` would hold the scores of all pairs: repeated keys and values are smaller.
    """
    if q.device.type == "cpu":
        return True
    return _has_flash(q) and mask is None


def _has_flash(q: Tensor) -> bool:
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256:
        return False
    device = torch.get_device_module(q.device)
    return not device.is_available() or device.get_device_capability(q.device) >= (8, 0)  # not there: q is fake


class Sequence(NamedTuple):
    """What attention must know of a sequence of tokens.

    tokens: of the whole sequence, also where others have cut it. causal: token i sees tokens 0 … i. segments: where
    packed samples part, from 0 to `tokens`: (0, 3, 9) are one of 3 tokens and one of 6. Tokens see their sample only.
    """

    tokens: int
    causal: bool = False
    segments: tuple[int, ...] | None = None


def core(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, mask: Tensor | None = None) -> Tensor:
    """The attention between tokens where all of them are here: the seam of a ladder that nobody has cut.

    q B L H h, k and v B L K h -> B L H h, see `attention`; any number of packed samples, and no token at all.
    mask: B L, bool, of the whole sequence: True for a token that is attended (as a key; every token asks). None: all.
    Raises ValueError for a mask together with causal or with segments.
    """
    if sequence.segments is None:
        return attention(q, k, v, sequence.causal, mask)
    if mask is not None:
        raise ValueError("packed samples with a mask of keys: leave out what is masked when you pack")
    if len(sequence.segments) <= 2:  # one sample, or none
        return attention(q, k, v, sequence.causal)
    if _has_flash(q):
        from mm_models.varlen import attend  # with torch's compiler: 70 MiB that only this needs

        return attend(q, k, v, sequence)
    return _attend_by_length(q, k, v, sequence)


def _attend_by_length(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence) -> Tensor:
    """Packed samples of equal length in one call, as a batch."""
    lengths = [b - a for a, b in pairwise(sequence.segments)]
    places: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        places.setdefault(length, []).append(i)
    parts = [x.split(lengths, 1) for x in (q, k, v)]  # whose backward is one cat, where slices would each fill a whole
    outs: dict[int, Tensor] = {}
    for alike in places.values():
        out = attention(*(torch.cat([part[i] for i in alike]) for part in parts), sequence.causal)
        outs |= zip(alike, out.chunk(len(alike)), strict=True)
    return torch.cat([outs[i] for i in range(len(lengths))], 1)


def identity(x, *_):
    """A seam that nobody uses."""
    return x


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts the parameters of `model` in place to `dtype`, except what it keeps in float32.

    `model.keep_fp32` are `fnmatch` patterns of parameter names. Use this instead of `model.to(bfloat16)`, which
    would round these too (time embedding, modulation tables, norms). Returns the model.
    """
    for name, parameter in model.named_parameters():
        keep = any(fnmatch(name, pattern) for pattern in model.keep_fp32)
        target = torch.promote_types(dtype, torch.float32) if keep else dtype
        parameter.data = parameter.data.to(target)
    return model


def count_flowing(model: nn.Module, ladder: str, behind: tuple[str, ...]) -> int:
    """Of the layers of a ladder, through how many gradients flow: from the first into which something trained flows.

    behind: how names of parameters begin that come after the ladder. Of a model of which nothing is trained it is all:
    then it is trained through.
    """
    layers = len(model.get_submodule(ladder))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    names = [name for name in trained if not name.startswith(behind)]
    if not trained or any(not name.startswith(f"{ladder}.") for name in names):
        return layers
    return layers - min((int(name.split(".")[1]) for name in names), default=layers)
