"""How a Wan model may be cut, as data."""

from mm_models.wan.model import WanModel
from mm_parallel.plan import ParallelPlan


def plan(model: WanModel) -> ParallelPlan:
    image = model.config.image_dim is not None
    return ParallelPlan(
        rungs=("blocks.*",),
        fp32=model.islands,
        last=("head",),
        tokens={"x": 1, "rope": 1, "mod": 1},
        gather="head.gather",
        heads=model.config.num_heads,
        columns=(
            *(f"blocks.*.{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkv"),
            *((f"blocks.*.cross_attn.{name}_img" for name in "kv") if image else ()),
            "blocks.*.ffn.0",
        ),
        rows=("blocks.*.self_attn.o", "blocks.*.cross_attn.o", "blocks.*.ffn.2"),
        norms=(
            *(f"blocks.*.{attention}.norm_{name}" for attention in ("self_attn", "cross_attn") for name in "qk"),
            *(("blocks.*.cross_attn.norm_k_img",) if image else ()),
        ),
    )
