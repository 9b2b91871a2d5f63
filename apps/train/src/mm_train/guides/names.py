"""The table of MindSpeed-MM's names."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from mm_parallel import MemoryConfig
from mm_train.config import DataConfig, LayoutConfig

Section = Literal["parallel", "memory", "data"]
SECTIONS: tuple[Section, ...] = get_args(Section)
OURS = {
    "parallel": {field.name for field in fields(LayoutConfig)},
    "memory": {field.name for field in fields(MemoryConfig)},
    "data": {field.name for field in fields(DataConfig)},
}


@dataclass(frozen=True)
class Name:
    """One row.

    guides: the name in MindSpeed-MM's guides, with underscores. section: where it may be given here. ours: the fields
        that it sets, if any.
    says: how its value becomes ours, or why there is nothing to do. as_is: the value carries over unchanged.
    also: other spellings, such as the variables of its shell scripts.
    """

    guides: str
    section: Section
    ours: tuple[str, ...] = ()
    says: str = ""
    as_is: bool = False
    also: tuple[str, ...] = ()


def _nothing(section: Section, says: str, names: str) -> tuple[Name, ...]:
    return tuple(Name(name, section, says=says) for name in names.split())


NAMES: tuple[Name, ...] = (
    Name("tensor_model_parallel_size", "parallel", ("tp",), as_is=True, also=("tp",)),
    Name("context_parallel_size", "parallel", ("cp",), "any number: heads and tokens need not divide", True, ("cp",)),
    Name(
        "context_parallel_algo",
        "parallel",
        ("ulysses", "ring"),
        "`ulysses_cp_algo` (if none is given): all of cp is ulysses; `megatron_cp_algo`: ring; `hybrid_cp_algo`: both",
    ),
    Name("ulysses_degree_in_cp", "parallel", ("ulysses",), "the rest of cp is ring", as_is=True),
    Name(
        "pipeline_num_layers",
        "parallel",
        ("pp_layers",),
        "flat, or a list for each virtual stage; its length is the number of ranks; unused where PP is 1",
        as_is=True,
    ),
    Name(
        "llm_pp_layers",
        "parallel",
        ("pp_layers",),
        "pipeline_num_layers of a language model, as mm-convert has it; with vit_pp_layers",
        as_is=True,
    ),
    Name(
        "vit_pp_layers",
        "parallel",
        says="its vision tower, for as many stages: it runs as a whole on the first, as in [[32,0]]",
    ),
    Name(
        "pipeline_model_parallel_size",
        "parallel",
        ("pp_layers",),
        "must be the length of pipeline_num_layers",
        also=("pp",),
    ),
    Name(
        "virtual_pipeline_model_parallel_size",
        "parallel",
        ("pp_layers",),
        "must be the number of lists in pipeline_num_layers; 1 or less is off",
        also=("vp",),
    ),
    Name(
        "num_layers_per_virtual_pipeline_stage", "parallel", says="refused, as there: give nested pipeline_num_layers"
    ),
    Name("layerzero", "parallel", ("dp_shard",), "with zero3_size, which is 8 if it is not given"),
    Name(
        "zero3_size",
        "parallel",
        ("dp_shard",),
        "divided by cp, as context ranks share the shards; dp_replicate is the rest of the ranks",
    ),
    Name("use_torch_fsdp2", "parallel", says="always: FSDP2 it is; see sharding_size"),
    Name("sharding_size", "parallel", ("dp_shard",), 'as zero3_size; "auto" is -1, what is left; null is 1'),
    *_nothing(
        "parallel",
        "shapes may change from step to step anyway: a schedule for each is made when it comes",
        "variable_seq_lengths",
    ),
    *_nothing("parallel", "the model's plan says whether attention is causal", "attention_mask_type"),
    *_nothing("parallel", "always so: keys and values travel while attention computes", "use_cp_send_recv_overlap"),
    *_nothing(
        "parallel",
        "a matter of speed in MindSpeed's kernels; the ring is single and results are the same",
        "cp_window_size megatron_cp_in_bnsd",
    ),
    *_nothing(
        "parallel",
        "tokens outside of attention and feed-forward are cut by cp, not by tp; results are the same",
        "sequence_parallel",
    ),
    *_nothing(
        "parallel",
        "optimizer states are sharded like the parameters, by dp_shard, with their communication overlapped",
        "use_distributed_optimizer overlap_grad_reduce overlap_param_gather",
    ),
    *_nothing(
        "parallel",
        "of Megatron's and MindSpeed's patches, of which there are none here",
        "optimization_level use_multiparameter_pipeline_model_parallel untie_embeddings_and_output_weights "
        "use_cpu_initialization init_model_with_meta_device align_fsdp_param_groups",
    ),
    *_nothing("parallel", "checkpoints are DCP directories, and load into any layout", "ckpt_format ckpt_load_path"),
    *_nothing(
        "parallel",
        "the fields of that file are given instead, under the same names",
        "layerzero_config fsdp2_config_path",
    ),
    *_nothing(
        "parallel",
        "the model's plan says what is sharded together, and what stays in fp32",
        "transformer_layers sub_modules_to_wrap ignored_modules param_init_fn",
    ),
    *_nothing(
        "parallel",
        "one dtype of the computation is given to parallelize",
        "param_dtype buffer_dtype output_dtype cast_forward_inputs autocast_input autocast_output downcast_to_bf16",
    ),
    Name("reshard_after_forward", "memory", ("reshard",), "true or false", as_is=True),
    Name("reduce_dtype", "memory", ("reduce",), "`fp32`: float32; `bf16`: bfloat16"),
    Name("num_to_forward_prefetch", "memory", ("prefetch",), "one number for both directions: the larger"),
    Name("num_to_backward_prefetch", "memory", ("prefetch",), "one number for both directions: the larger"),
    *_nothing(
        "memory", "FSDP2 does it; prefetch says how far ahead", "backward_prefetch forward_prefetch limit_all_gathers"
    ),
    Name("offload_to_cpu", "memory", ("offload_params",), "true or false", as_is=True),
    *_nothing("memory", "as offload_to_cpu needs it", "pin_memory offload_grads"),
    Name(
        "recompute_granularity",
        "memory",
        ("recompute",),
        '`full`: recompute "full", or the number of recompute_num_layers; `selective` is refused, as there',
    ),
    Name(
        "recompute_method",
        "memory",
        ("recompute",),
        '`block`: the first layers of each stage; `uniform`: "full" (theirs is wrong for more than one layer)',
    ),
    Name("recompute_num_layers", "memory", ("recompute",), as_is=True, also=("recompute_full_layers",)),
    Name(
        "recompute_skip_core_attention", "memory", ("but_attention",), "with recompute_num_layers_skip_core_attention"
    ),
    Name("recompute_num_layers_skip_core_attention", "memory", ("but_attention",), as_is=True),
    Name("recompute_modules", "memory", ("recompute",), '"full" for all blocks; other choices are refused'),
    Name(
        "attention_async_offload",
        "memory",
        ("offload",),
        '`true`: "attention", for the layers of recompute_num_layers_skip_core_attention; without any, nothing',
    ),
    Name("distribute_saved_activations", "memory", says="refused, as there"),
    *_nothing("memory", "recompute is non-reentrant, and the same numbers", "use_reentrant"),
    Name(
        "interleaved",
        "data",
        ("encode_every",),
        "`true`: interleaved_steps; `false`, as it is there without a word: 0, the encoders stay on the device",
    ),
    Name(
        "interleaved_steps",
        "data",
        ("encode_every",),
        "so many steps are encoded at a time, then the encoders go to the host; there it needs interleaved, here too",
    ),
    Name(
        "encoder_offload_interval",
        "data",
        ("encode_every",),
        "its later name, without interleaved; 1, as it is there without a word, is off: 0",
    ),
    Name("enable_encoder_dp", "data", ("share_encoding",), "true or false", True),
    Name(
        "seq_length",
        "data",
        ("max_tokens",),
        "of conversations; there what is behind it is cut off without a word, here see too_long",
        True,
    ),
    Name("data_path", "data", ("manifest",), "of videos; that of features is features", True),
    *_nothing("data", "a line of data.txt names the folder, other lists stand beside their videos", "data_folder"),
    Name(
        "from_pretrained",
        "data",
        ("encoders",),
        "of VAE, tokenizer and text encoder: one folder with vae/, tokenizer/, text_encoder/; of the model --weights",
        True,
    ),
)

_BY_NAME = {spelling: row for row in NAMES for spelling in (row.guides, *row.also)}


def table() -> str:
    """The table in Markdown, for the documentation."""
    lines = ["| MindSpeed-MM | here | |", "|---|---|---|"]
    for row in NAMES:
        also = [name.upper() if len(name) == 2 else name for name in row.also]  # PP is a variable of a shell script
        names = ", ".join(f"`{name}`" for name in (row.guides, *also))
        ours = ", ".join(f"`{row.section}.{field}`" for field in row.ours)
        lines.append(f"| {names} | {ours or '—'} | {row.says} |")
    return "\n".join(lines) + "\n"


def row_of(name: str) -> Name | None:
    """The row of a name in any spelling: dashes or underscores, with or without leading `--`."""
    return _BY_NAME.get(plain(name))


def spellings() -> list[str]:
    """All that the table knows."""
    return list(_BY_NAME)


def plain(name: str) -> str:
    return name.removeprefix("--").replace("-", "_").lower()
