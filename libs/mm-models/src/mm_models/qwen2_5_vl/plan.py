"""How a Qwen2.5-VL model may be cut, as data: the language model, and in its stem the vision tower."""

from mm_models.qwen2_5_vl.model import Qwen25VLModel
from mm_parallel.plan import ParallelPlan


def plan(model: Qwen25VLModel) -> ParallelPlan:
    config = model.config

    def each(*names: str) -> tuple[str, ...]:
        return tuple(f"model.layers.*.{name}" for name in names)

    return ParallelPlan(
        layers=("model.layers.*",),
        last=("model.norm",) if config.tied else ("model.norm", "lm_head"),
        tokens={"x": 1, "rope": 2, "labels": 1},
        heads={"key-value heads": config.num_kv_heads, "heads": config.num_heads},
        head_dim=config.head_dim,
        columns=each("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
        rows=each("self_attn.o_proj", "mlp.down_proj"),
        vocabulary=("model.embed_tokens",) if config.tied else ("model.embed_tokens", "lm_head"),
        inner={"visual": _plan_tower(config.merged)},
    )


def _plan_tower(merged: int) -> ParallelPlan:
    """Its attention stays whole: q, k and v are rows of one matrix, which holds less than a third of a layer."""
    return ParallelPlan(
        layers=("blocks.*",),
        columns=("blocks.*.mlp.gate_proj", "blocks.*.mlp.up_proj", "merger.mlp.0"),
        rows=("blocks.*.mlp.down_proj", "merger.mlp.2"),
        share="share",
        collect="collect",
        merge=merged,
    )
