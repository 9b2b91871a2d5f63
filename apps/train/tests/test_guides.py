"""What a reader of MindSpeed-MM's guides writes, and the layout that it is here."""

import math
import subprocess
import sys
from dataclasses import fields

import pytest

from mm_convert.cli.values import check_fields
from mm_parallel import MemoryConfig, ParallelConfig
from mm_train.config import DataConfig
from mm_train.guides import arguments, from_guides, table, translate, translate_data
from mm_train.guides.names import NAMES
from mm_train.recipe import load_config

T2V_14B = {  # examples/wan2.1/14b/t2v: pretrain.sh, zero_config.yaml and pretrain_model.json together
    "TP": "1",
    "PP": "1",
    "VP": "1",
    "CP": "1",
    "--context-parallel-algo": "ulysses_cp_algo",
    "--optimization-level": "2",
    "--use-multiparameter-pipeline-model-parallel": True,
    "--use-distributed-optimizer": True,
    "--layerzero": True,
    "--layerzero-config": "zero_config.yaml",
    "zero3_size": 8,
    "transformer_layers": ["mindspeed_mm.models.predictor.dits.wan_dit.WanDiTBlock"],
    "forward_prefetch": True,
    "--recompute-granularity": "full",
    "--recompute-method": "block",
    "--recompute-num-layers": 0,
    "--recompute-skip-core-attention": True,
    "--recompute-num-layers-skip-core-attention": 40,
    "attention_async_offload": True,
    "pipeline_num_layers": [10, 10, 10, 10],
}


def test_a_whole_script_of_the_guides():
    parallel, memory, notes = translate(T2V_14B)
    assert parallel == {"cp": 1, "dp_shard": 8, "tp": 1}
    assert memory == {"recompute": 0, "but_attention": 40, "offload": "attention"}
    ParallelConfig(**parallel).resolve(8)
    MemoryConfig(**memory)
    assert [note.split(":")[0] for note in notes] == [
        "optimization_level",
        "use_multiparameter_pipeline_model_parallel",
        "use_distributed_optimizer",
        "layerzero_config",
        "transformer_layers",
        "forward_prefetch",
        "pipeline_num_layers",
    ]
    assert notes[-1] == "pipeline_num_layers: PP is 1, so there is no pipeline; with it there would be 4 stages"


PARALLEL = [
    ({"tensor-model-parallel-size": 2}, {"tp": 2}),
    ({"CP": 4}, {"cp": 4}),
    ({"context_parallel_size": 4, "context_parallel_algo": "megatron_cp_algo"}, {"ring": 4}),
    (
        {"CP": 8, "context-parallel-algo": "hybrid_cp_algo", "ulysses-degree-in-cp": 4},
        {"ulysses": 4, "ring": 2},
    ),
    ({"ulysses_degree_in_cp": 2}, {"ulysses": 2}),
    ({"pipeline_num_layers": "[7, 8, 8, 7]", "PP": 4}, {"pp_layers": (7, 8, 8, 7)}),
    ({"pipeline_num_layers": [7, 8, 8, 7]}, {"pp_layers": (7, 8, 8, 7)}),
    (
        {"pipeline_num_layers": [[3, 4, 4, 4], [3, 4, 4, 4]], "PP": 4, "VP": 2},
        {"pp_layers": ((3, 4, 4, 4), (3, 4, 4, 4))},
    ),
    ({"PP": 1, "VP": 1}, {}),
    ({"pipeline_num_layers": [36], "PP": 1}, {}),
    ({"llm_pp_layers": "[[36]]", "vit_pp_layers": "[[32]]"}, {}),
    ({"llm_pp_layers": "[[12,16]]", "vit_pp_layers": "[[32,0]]"}, {"pp_layers": ((12, 16),)}),
    ({"llm-pp-layers": [1, 10, 10, 7], "vit-pp-layers": [32, 0, 0, 0], "PP": 4}, {"pp_layers": (1, 10, 10, 7)}),
    ({"layerzero": True}, {"dp_shard": 8}),
    ({"zero3_size": 8, "CP": 2}, {"cp": 2, "dp_shard": 4}),
    ({"sharding_size": "auto"}, {"dp_shard": -1}),
    ({"sharding_size": None}, {"dp_shard": 1}),
    ({"sharding_size": 16}, {"dp_shard": 16}),
]
MEMORY = [
    ({"recompute_granularity": "full"}, {"recompute": "full"}),
    (
        {"recompute-granularity": "full", "recompute-method": "block", "recompute-num-layers": 20},
        {"recompute": 20},
    ),
    (
        {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1},
        {"recompute": "full"},
    ),
    ({"recompute-full-layers": 3}, {"recompute": 3}),
    (
        {"recompute_num_layers": 30, "recompute_num_layers_skip_core_attention": 10},
        {"recompute": 30, "but_attention": 10},
    ),
    ({"recompute_modules": ["predictor.blocks.{*}"], "use_reentrant": True}, {"recompute": "full"}),
    ({"reshard_after_forward": "false", "offload_to_cpu": True}, {"reshard": False, "offload_params": True}),
    ({"param_dtype": "bf16", "reduce_dtype": "fp32"}, {"reduce": "float32"}),
    ({"reduce_dtype": "bf16"}, {"reduce": "bfloat16"}),
    ({"num_to_forward_prefetch": 2, "num_to_backward_prefetch": 2}, {"prefetch": 2}),
    ({"attention_async_offload": False}, {"offload": "none"}),
]


@pytest.mark.parametrize(("settings", "ours"), PARALLEL)
def test_layouts(settings, ours):
    parallel, memory, _ = translate(settings)
    assert (parallel, memory) == (ours, {})
    ParallelConfig(**parallel)


@pytest.mark.parametrize(("settings", "ours"), MEMORY)
def test_memory(settings, ours):
    parallel, memory, _ = translate(settings)
    assert (parallel, memory) == ({}, ours)
    MemoryConfig(**memory)


REFUSED = [
    (
        {"tensor-model-paralel-size": 2},
        "tensor-model-paralel-size is none of MindSpeed-MM's names: is it tensor_model_p",
    ),
    ({"TP": 2, "tensor-model-parallel-size": 2}, "is given twice"),
    ({"TP": 0}, "tensor_model_parallel_size is 0, but must be a whole number of at least 1"),
    ({"TP": "two"}, "tensor_model_parallel_size is 'two', but must be"),
    ({"context_parallel_algo": "ring"}, "context_parallel_algo ring is not implemented: use ulysses_cp_algo, megatron"),
    ({"CP": 4, "context_parallel_algo": "hybrid_cp_algo"}, "hybrid_cp_algo needs ulysses_degree_in_cp"),
    ({"CP": 4, "ulysses_degree_in_cp": 3}, "context_parallel_size 4 is not a multiple of ulysses_degree_in_cp 3"),
    (
        {"CP": 4, "context_parallel_algo": "megatron_cp_algo", "ulysses_degree_in_cp": 2},
        "ulysses_degree_in_cp is for hybrid_cp_algo, not for megatron_cp_algo",
    ),
    ({"PP": 4}, r"pipeline_num_layers must be given for a pipeline \(PP 4, VP 1\)"),
    (
        {"PP": 3, "pipeline_num_layers": [7, 8, 8, 7]},
        "PP 3 must equal the number of ranks in pipeline_num_layers .*: 4",
    ),
    (
        {"PP": 4, "VP": 2, "pipeline_num_layers": [7, 8, 8, 7]},
        "_size 2 must equal the length of pipeline_num_layers, which has 1 virtual stages of 4 ranks",
    ),
    (
        {"PP": 4, "VP": 1, "pipeline_num_layers": [[3, 4, 4, 4], [3, 4, 4, 4]]},
        "_size 1 must equal the length of pipeline_num_layers, which has 2 virtual stages of 4 ranks",
    ),
    ({"num_layers_per_virtual_pipeline_stage": 2}, "deprecated"),
    ({"llm_pp_layers": [12, 16], "vit_pp_layers": [16, 16]}, "vit_pp_layers .*: 16 of 32 layers are behind the first"),
    ({"llm_pp_layers": [12, 16], "vit_pp_layers": [32]}, "vit_pp_layers has 1 stages, llm_pp_layers has 2"),
    ({"vit_pp_layers": [32, 0]}, "vit_pp_layers without llm_pp_layers"),
    ({"llm_pp_layers": [4, 4], "pipeline_num_layers": [4, 4]}, "two names of one thing: give one of them"),
    ({"PP": 3, "llm_pp_layers": [12, 16]}, r"PP 3 must equal the number of ranks in llm_pp_layers \(12, 16\): 2"),
    ({"pipeline_num_layers": 4}, "it takes a list"),
    ({"zero3_size": 8, "sharding_size": 8}, "give one of them"),
    ({"zero3_size": 8, "CP": 3}, "zero3_size 8 must be a multiple of context_parallel_size 3"),
    ({"recompute_granularity": "selective"}, "selective is not supported"),
    ({"recompute_method": "blok"}, "there are block and uniform"),
    ({"recompute_modules": ["predictor.blocks.{0-20}"]}, "only all blocks"),
    ({"recompute_skip_core_attention": True}, "needs recompute_num_layers_skip_core_attention"),
    (
        {"recompute_granularity": "full", "recompute_num_layers_skip_core_attention": 4},
        "needs recompute_num_layers and",
    ),
    ({"distribute_saved_activations": True}, "not implemented"),
    ({"reshard_after_forward": 8}, "reshard_after_forward is 8, but here it can only be true or false"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        translate(settings)


DATA = [
    ({"interleaved": True, "interleaved_steps": 10}, {"encode_every": 10}),
    ({"interleaved": "true", "interleaved-steps": "10"}, {"encode_every": 10}),
    ({"interleaved": True}, {"encode_every": 1}),
    ({"interleaved": False}, {"encode_every": 0}),
    ({"encoder_offload_interval": 4}, {"encode_every": 4}),
    ({"encoder_offload_interval": 1}, {"encode_every": 0}),
    ({"enable_encoder_dp": True}, {"share_encoding": True}),
    ({"data_path": "data.txt", "from_pretrained": "E"}, {"manifest": "data.txt", "encoders": "E"}),
    ({"seq-length": "1024"}, {"max_tokens": 1024}),
]


@pytest.mark.parametrize(("settings", "ours"), DATA)
def test_data(settings, ours):
    assert translate_data(settings) == (ours, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interleaved_steps": 10}, "interleaved_steps 10 does nothing without interleaved: give interleaved true"),
        ({"interleaved": False, "interleaved_steps": 10}, "does nothing without interleaved"),
        (
            {"interleaved": True, "interleaved_steps": 0},
            "interleaved_steps is 0, but must be a whole number of at least 1",
        ),
        ({"interleaved": 3}, "interleaved is 3, but here it can only be true or false"),
        ({"interleaved": True, "interleaved_steps": 2, "encoder_offload_interval": 2}, "two names of one thing"),
        ({"TP": 2}, "tensor_model_parallel_size is no name of data: it is parallel.tensor_model_parallel_size"),
    ],
)
def test_data_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        translate_data(settings)


def test_data_on_a_command_line_and_in_a_file(tmp_path):
    """`interleaved` of Open-Sora-Plan's guide, with our own names beside it."""
    flags = ["--model", "opensoraplan-tiny", "--data.manifest", "data.txt", "--data.geometry.num_frames", "29"]
    read = load_config([*flags, "--data.interleaved", "--data.interleaved_steps", "10"])
    assert (read.data.encode_every, read.data.manifest.name, read.data.geometry.num_frames) == (10, "data.txt", 29)
    (tmp_path / "mine.toml").write_text("[data]\ninterleaved = false\nglobal_batch = 4\n", encoding="utf-8")
    read = load_config([*flags, "--config", str(tmp_path / "mine.toml")])
    assert (read.data.encode_every, read.data.global_batch) == (0, 4)
    with pytest.raises(ValueError, match=r"data\.interleaved and data\.encode_every are two names of one thing"):
        from_guides("data", {"interleaved": True, "encode_every": 2})


def test_offload_without_a_layer_to_offload_is_said():
    _, memory, notes = translate({"attention_async_offload": True, "recompute_num_layers": 4})
    assert memory == {"recompute": 4, "offload": "none"}
    assert notes == ["attention_async_offload: no layer skips core attention in its recompute, so it does nothing"]


@pytest.mark.parametrize(
    ("section", "both", "ours"),
    [
        ("parallel", {"pipeline_num_layers": [7, 8, 8, 7]}, {"pp_layers": (7, 8, 8, 7)}),
        ("parallel", {"zero3_size": 8, "cp": 2}, {"dp_shard": 4, "cp": 2}),
        ("parallel", {"zero3_size": 8, "ulysses": 2, "ring": 2}, {"dp_shard": 2, "ulysses": 2, "ring": 2}),
        ("parallel", {"cp": 4, "context_parallel_algo": "megatron_cp_algo"}, {"cp": 4, "ring": 4}),
        ("parallel", {"cp": 4, "context_parallel_algo": "ulysses_cp_algo", "tp": 2}, {"cp": 4, "tp": 2}),
        ("parallel", {"tpp": 2, "tp": 2}, {"tpp": 2, "tp": 2}),
        ("memory", {"recompute_num_layers": 10, "prefetch": 1}, {"recompute": 10, "prefetch": 1}),
        (
            "memory",
            {"recompute": 3, "recompute_num_layers_skip_core_attention": 4},
            {"recompute": 3, "but_attention": 4},
        ),
        (
            "memory",
            {"recompute": 0, "but_attention": 4, "attention_async_offload": True},
            {"recompute": 0, "but_attention": 4, "offload": "attention"},
        ),
    ],
)
def test_both_kinds_of_names_in_one_section(section, both, ours):
    found, notes = from_guides(section, both)
    assert found == ours
    assert notes == []


@pytest.mark.parametrize(
    ("section", "both", "message"),
    [
        (
            "parallel",
            {"tensor_model_parallel_size": 2, "tp": 2},
            "parallel.tensor_model_parallel_size and parallel.tp are",
        ),
        ("parallel", {"pipeline_num_layers": [4, 4], "pp_layers": [4, 4]}, "two names of one thing: give one of them"),
        ("parallel", {"context_parallel_size": 2, "cp": 4}, "parallel.context_parallel_size and parallel.cp are"),
        (
            "memory",
            {"recompute_num_layers": 10, "recompute": "full"},
            "memory.recompute_num_layers and memory.recompute",
        ),
    ],
)
def test_one_thing_under_two_names_is_refused(section, both, message):
    with pytest.raises(ValueError, match=message):
        from_guides(section, both)


def test_a_command_line():
    argv = ["--model", "vace-14b", "--parallel.pipeline_num_layers", "[7,8,8,7]", "--parallel.tp=2", "--lr", "-1"]
    argv += ["--parallel.sharding-size", "auto", "--memory.recompute_num_layers", "10", "--memory.offload_to_cpu"]
    argv += ["--parallel.use_distributed_optimizer", "--parallel.bogus", "3", "--parallel.dp_replicate", "2"]
    ours, notes = arguments(argv)
    assert ours == [
        *("--model", "vace-14b", "--parallel.tp=2", "--lr", "-1", "--parallel.bogus=3", "--parallel.dp_replicate=2"),
        *("--parallel.pp_layers=[7, 8, 8, 7]", "--parallel.dp_shard=-1"),
        *("--memory.recompute=10", "--memory.offload_params=true"),
    ]
    assert [note.split(":")[0] for note in notes] == ["use_distributed_optimizer"]
    assert arguments(ours) == (ours, [])


def test_names_whose_value_carries_over():
    values = {"pp_layers": (4, 4), "reshard": True, "offload_params": True}
    values |= {"share_encoding": False, "manifest": "data.txt", "encoders": "E"}
    for row in NAMES:
        if row.as_is:
            (field,) = row.ours
            value = values.get(field, 3)
            found, notes = from_guides(row.section, {row.guides: value})
            assert (found[field], notes) == (value, []), row


ODD = [
    "x",
    "",
    "#1",
    "~",
    "1e5",
    "0x10",
    "nan",
    "7" * 5000,
    "[" * 5000,
    "[1",
    "[[1], 2]",
    '["x"]',
    "[[[1]]]",
    "{}",
    "null",
]
ODD += ["-7", "0", "1.5", "true", 1.5, -7, [], ["x"], [[1, [2]]], {"a": 1}, math.nan, None, "1_000", "12:30"]


@pytest.mark.parametrize("row", [row for row in NAMES if row.ours], ids=lambda row: row.guides)
def test_odd_values_are_refused_by_name_or_taken(row):
    for value in ODD:
        for settings in ({row.guides: value}, {row.guides: value, "context_parallel_size": 2, "sharding_size": 4}):
            refused = ""
            try:
                parallel, memory, _ = translate(settings)
                check_fields(ParallelConfig, parallel)
                check_fields(MemoryConfig, memory)
                if row.section == "data":
                    check_fields(DataConfig, translate_data({row.guides: value})[0])
            except ValueError as error:
                refused = str(error)
            assert not refused or any(name in refused for name in settings), (settings, refused)


@pytest.mark.parametrize("field", ["cp", "ulysses", "ring"])
@pytest.mark.parametrize("value", ["x", "{}", "[1]", "0", "1.5"])
def test_our_own_names_beside_theirs_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"parallel.{field} is "):
        from_guides("parallel", {field: value, "zero3_size": 8})


def test_every_row_names_fields_that_are_there():
    known = {
        kind: {f.name for f in fields(made)}
        for kind, made in (("parallel", ParallelConfig), ("memory", MemoryConfig), ("data", DataConfig))
    }
    assert all(known[row.section].issuperset(row.ours) for row in NAMES)
    assert all(row.says or row.as_is for row in NAMES)
    spellings = [name for row in NAMES for name in (row.guides, *row.also)]
    assert len(spellings) == len(set(spellings))


def test_the_table_for_the_documentation():
    lines = table().splitlines()
    assert len(lines) == len(NAMES) + 2
    assert (
        "| `pipeline_model_parallel_size`, `PP` | `parallel.pp_layers` | must be the length of pipeline_num_layers |"
        in lines
    )
    assert "| `recompute_num_layers`, `recompute_full_layers` | `memory.recompute` |  |" in lines
    assert all(line.count("|") == 4 for line in lines)


def test_torch_is_not_imported():
    code = "import sys, mm_train.guides; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
