"""How an Open-Sora-Plan model may be cut, as data."""

from mm_models.opensoraplan.model import OpenSoraPlanModel
from mm_parallel.plan import ParallelPlan


def plan(model: OpenSoraPlanModel) -> ParallelPlan:
    def each(*names: str) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.*.{name}" for name in names)

    attentions = ("attn1", "attn2")
    return ParallelPlan(
        layers=("transformer_blocks.*",),
        keep_fp32=model.keep_fp32,
        last=("proj_out", "scale_shift_table"),
        tokens={"x": 1, "rope": 1},  # not the mask: attention needs it whole
        heads=model.config.num_heads,
        head_dim=model.config.head_dim,
        columns=each(*(f"{attention}.to_{name}" for attention in attentions for name in "qkv"), "ff.net.0.proj"),
        rows=each(*(f"{attention}.to_out.0" for attention in attentions), "ff.net.2"),
    )
