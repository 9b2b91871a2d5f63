"""How a Wan model may be cut, as data."""

from mm_models.wan.model import WanModel
from mm_parallel.plan import ParallelPlan


def plan(model: WanModel) -> ParallelPlan:
    config = model.config
    image = config.image_dim is not None and config.image_kv
    blocks = ("blocks.*", "vace_blocks.*") if config.vace_layers else ("blocks.*",)

    def each(*names: str) -> tuple[str, ...]:
        return tuple(f"{block}.{name}" for block in blocks for name in names)

    attentions = ("self_attn", "cross_attn")
    return ParallelPlan(
        layers=("blocks.*",),
        companions={f"vace_blocks.{n}": i for n, i in enumerate(config.vace_layers)},
        keep_fp32=model.keep_fp32,
        last=("head",),
        tokens={"x": 1, "rope": 1, "noisy": 1, "control": 1},
        gather="head.gather",
        heads=config.num_heads,
        head_dim=config.head_dim,
        columns=each(
            *(f"{attention}.{name}" for attention in attentions for name in "qkv"),
            *((f"cross_attn.{name}_img" for name in "kv") if image else ()),
            "ffn.0",
        ),
        rows=each("self_attn.o", "cross_attn.o", "ffn.2"),
        norms=each(
            *(f"{attention}.norm_{name}" for attention in attentions for name in "qk"),
            *(("cross_attn.norm_k_img",) if image else ()),
        ),
    )
