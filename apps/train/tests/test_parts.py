"""Parts of a model: what is trained of it, at which rate, what gets adapters, and what comes out of it."""

import json
from dataclasses import replace

import pytest
import torch

from mm_convert import convert, open_checkpoint, open_lora
from mm_models import build, preset
from mm_models.lora import load_lora, merge_lora
from mm_models.qwen2_5_vl.testing import write_hub_folder
from mm_models.tokens import NextToken
from mm_train.checkpoint import Checkpointer
from mm_train.config import OptimConfig
from mm_train.export import export
from mm_train.optim import EMA, build_optimizer, learning_rate
from mm_train.recipe import load_config
from mm_train.start import build_model

CPU = torch.device("cpu")
TOKENS = ("image_token", "video_token", "vision_start_token", "vision_end_token", "bos_token", "eos_token")
GRID = (1, 4, 6)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub_folder(tmp_path_factory.mktemp("hub") / "tiny")


def shape_of(hub):
    """Fields that the preset leaves to the tokenizer."""
    return {name: open_checkpoint(hub).config[name] for name in TOKENS}


def configure(weights, hub, output, *more):
    model = ("--model", "qwen2.5-vl-tiny", "--architecture", json.dumps(shape_of(hub)), "--data.processor", str(hub))
    output.mkdir(exist_ok=True)
    run = ("--weights", str(weights), "--output", str(output), "--dtype", "float32", "--optim.lr", "1e-3")
    return load_config([*model, *run, "--steps", "3", *more])


def pack(hub):
    """Two conversations, one with an image of 24 patches, which are 6 tokens."""
    draw, image = torch.Generator().manual_seed(0), shape_of(hub)["image_token"]
    ids = torch.randint(0, 256, (1, 19), generator=draw)
    ids[0, 3:9] = image
    labels = torch.randint(0, 256, (1, 19), generator=draw)
    labels[0, :10] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(13), torch.arange(6)]).expand(1, 3, -1),
        "segments": torch.tensor([[0, 13, 19]]),
        "pixel_values": torch.randn(1, 24, 1176, generator=draw),
        "grid_thw": torch.tensor([[GRID]]),
    }


def logits(model, hub):
    given = NextToken().inputs(pack(hub))
    del given["labels"]
    with torch.no_grad():
        return model(**given)


def run(config, hub, save=False):
    """Three steps; (model, its parameters before, learning rates of each step by parameter)."""
    built, objective, tensors = build_model(config, None, CPU, continuing=False), NextToken(), pack(hub)
    optimizer = build_optimizer(built.parameters, config.optim, built.rates)
    highest = [group["lr"] for group in optimizer.param_groups]
    names = {parameter: name for name, parameter in built.parameters.named_parameters()}
    before = {name: tensor.clone() for name, tensor in built.parameters.state_dict().items()}
    rates = []
    for step in range(config.steps):
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = learning_rate(step, config.steps, config.optim, rate)
        rates.append({names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        losses = objective.losses(built.model(**objective.inputs(tensors)), tensors)
        (losses.sum() / objective.weigh(tensors).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    if save:
        from mm_convert.cli.arguments import dump

        average = EMA(built.parameters, config.optim.ema)
        checkpoints = Checkpointer(config.run_dir / "checkpoints", 1)
        progress = {"step": config.steps, "cursor": 0, "skipped": 0, "dataset": "", "contents": {}}
        checkpoints.save(config.steps, built.parameters, optimizer, average, progress, dump(config))
        checkpoints.wait()
    return built, before, rates


def changed(built, before):
    return {name for name, tensor in built.parameters.state_dict().items() if not torch.equal(tensor, before[name])}


PARTS = {
    "vision": ("visual.patch_embed.", "visual.blocks."),
    "merger": ("visual.merger.",),
    "language": ("model.", "lm_head."),
    "language:-1": ("model.layers.3.",),
    "vision:-2": ("visual.blocks.2.", "visual.blocks.3."),
}


@pytest.mark.parametrize("trained", [["merger"], ["vision:-2", "merger", "language"], ["language:-1", "lm_head.*"]])
def test_what_is_not_trained_stays_to_the_bit(trained, hub, tmp_path):
    built, before, rates = run(configure(hub, hub, tmp_path, "--trained", json.dumps(trained)), hub)
    firsts = tuple(first for part in trained for first in PARTS.get(part, (part.rstrip("*"),)))
    meant = {name for name in before if name.startswith(firsts)}
    assert meant
    assert changed(built, before) == meant == set(rates[0])
    assert built.trained == sum(before[name].numel() for name in meant)


def test_each_part_has_its_rate_and_the_schedule_is_the_same_for_all(hub, tmp_path):
    asked = {"vision": 4e-4, "language:-1": 2e-3, "*.mlp.up_proj.*": 0.0}
    schedule = ("--optim.schedule", "cosine", "--optim.min_lr", "1e-4", "--optim.warmup", "1")
    built, before, rates = run(configure(hub, hub, tmp_path, "--optim.rates", json.dumps(asked), *schedule), hub)
    plain = [
        learning_rate(step, 3, OptimConfig(lr=1e-3, schedule="cosine", min_lr=1e-4, warmup=1)) for step in range(3)
    ]
    assert len({*plain}) == 2  # the warmup ends at the top, where the cosine begins
    highest = {}
    for name in before:
        rate = next((rate for part, rate in asked.items() if name.startswith(PARTS.get(part, "-"))), 1e-3)
        highest[name] = 0.0 if ".mlp.up_proj." in name else rate  # the last that names it
    for step in range(3):
        assert rates[step] == pytest.approx({name: plain[step] * rate / 1e-3 for name, rate in highest.items()})
    assert {*before} - changed(built, before) == {name for name in before if ".mlp.up_proj." in name}


def test_a_table_says_what_is_trained_and_at_which_rate(hub, tmp_path):
    more = ("--trained", '["merger", "language:-2"]', "--optim.rates", '{"language": 2e-6}')
    built, before, _ = run(configure(hub, hub, tmp_path, *more), hub)
    sizes = {}
    for part in ("vision", "merger", "language"):
        sizes[part] = sum(tensor.numel() for name, tensor in before.items() if name.startswith(PARTS[part]))
    last = sum(t.numel() for name, t in before.items() if name.startswith(("model.layers.2.", "model.layers.3.")))
    rows = [" ".join(row.split()) for row in built.parts]
    assert rows == [
        f"vision {sizes['vision']:,} parameters, none trained",
        f"merger {sizes['merger']:,} parameters, {sizes['merger']:,} trained at 0.001",
        f"language {sizes['language']:,} parameters, {last:,} trained at 2e-06",
    ]
    assert sum(sizes.values()) == built.size
    assert sizes["merger"] + last == built.trained


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--trained", '["visoin"]'),
            r"--trained 'visoin' names no parameter, did you mean 'vision'\?; there are visi",
        ),
        (
            ("--trained", '["lanuage:-2"]'),
            r"there is no part 'lanuage', did you mean 'language'\?; there are vision, m",
        ),
        (
            ("--trained", '["language:-5"]'),
            r"'language:-5': language has 4 layers; ask for 1 to 4 of them, or for lang",
        ),
        (("--trained", '["merger:-1"]'), r"merger has 0 layers"),
        (("--optim.rates", '{"visual": 1e-5}'), r"--optim.rates 'visual' names no parameter"),
        (("--trained", '["merger"]', "--optim.rates", '{"vision": 1e-5}'), r"'vision': nothing of it is trained"),
        (
            ("--lora.rank", "2", "--lora.targets", '["vison:qkv"]'),
            "LoRA target 'vison:qkv' names no linear of this model, did you mean 'vision'?",
        ),
        (("--lora.rank", "2", "--lora.targets", '["vision:q_proj"]'), r"LoRA target 'vision:q_proj' names no linear"),
        (
            ("--lora.rank", "2", "--lora.targets", '["lm_head"]'),
            r"an adapter beside it would do nothing\. Leave it out",
        ),
    ],
)
def test_refuses(flags, message, hub, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_model(configure(hub, hub, tmp_path, *flags), None, CPU, continuing=False)


TARGETS = {
    None: {"language": 4 * 7},
    ("vision",): {"vision": 4 * 5},
    ("language",): {"language": 4 * 7},  # not the head
    ("merger", "language:q_proj"): {"merger": 2, "language": 4},
    ("vision:mlp.up_proj", "attn.qkv"): {"vision": 4 * 2},
    ("mlp.up_proj",): {"vision": 4, "language": 4},
}


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_on_any_part(targets, hub, tmp_path):
    more = () if targets is None else ("--lora.targets", json.dumps(targets))
    built, before, _ = run(configure(hub, hub, tmp_path, "--lora.rank", "2", *more), hub)
    adapted = {name.partition(".lora_")[0] for name in before if ".lora_" in name}
    found = {part: sum(name.startswith(PARTS[part]) for name in adapted) for part in ("vision", "merger", "language")}
    assert {part: count for part, count in found.items() if count} == TARGETS[targets]
    assert changed(built, before) == {name for name in before if ".lora_" in name}
    rows = {row.split()[0]: row for row in built.parts}
    assert {part for part in found if rows[part].endswith("(adapters)")} == set(TARGETS[targets])
    said = "note:" in rows
    assert said == bool({"vision", "merger"} & set(TARGETS[targets]))
    assert not said or "servers such as vLLM leave out adapters on" in rows["note:"]


@pytest.mark.parametrize("targets", [("vision", "merger", "language"), ("language",)])
def test_an_adapter_is_opened_by_peft_and_merged(targets, hub, tmp_path):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    more = ("--lora.rank", "3", "--lora.alpha", "5", "--lora.targets", json.dumps(targets), "--optim.lr", "3e-2")
    config = configure(hub, hub, tmp_path / "run", *more)
    built, _, _ = run(config, hub, save=True)
    wanted = logits(built.model.eval(), hub)
    folder = export(tmp_path / "run", tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(Qwen2_5_VLForConditionalGeneration.from_pretrained(hub), folder)
    assert ask(theirs, hub) == pytest.approx(wanted, abs=1e-4)
    base = build_model(configure(hub, hub, tmp_path / "base"), None, CPU, continuing=False).model
    assert not torch.allclose(logits(base, hub), wanted, atol=1e-2), "the adapter must do something"
    adapter = open_lora(folder)
    merged = merge_lora(load_lora(base, adapter, adapter.alphas))
    assert logits(merged, hub) == pytest.approx(wanted, abs=1e-4)
    whole = export(tmp_path / "run", tmp_path / "merged", merge=True)
    assert ask(Qwen2_5_VLForConditionalGeneration.from_pretrained(whole), hub) == pytest.approx(wanted, abs=1e-4)
    assert (whole / "preprocessor_config.json").is_file()
    again = configure(hub, hub, tmp_path / "again", *more, "--lora.weights", str(folder))
    assert logits(build_model(again, None, CPU, continuing=False).model.eval(), hub) == pytest.approx(wanted, abs=1e-5)


def ask(model, hub):
    """The logits of transformers for the pack, its conversations by themselves."""
    tensors, found = pack(hub), []
    with torch.no_grad():
        for start, stop, images in ((0, 13, True), (13, 19, False)):
            given = {
                "input_ids": tensors["input_ids"][:, start:stop],
                "position_ids": tensors["position_ids"][0, :, None, start:stop],
            }
            if images:
                given |= {"pixel_values": tensors["pixel_values"][0], "image_grid_thw": tensors["grid_thw"][0]}
            found.append(model(**given).logits)
    return torch.cat(found, 1)


TREES = {"release of tp 2": {"tp_size": 2}, "pp and tp": {"pp_layers": {"llm": [2, 2], "vit": [4, 0]}, "tp_size": 2}}


@pytest.mark.parametrize("start", ["hub", "newer names", "ours", *TREES])
def test_starts_from_what_people_have(start, hub, tmp_path):
    """And ends as a folder of the hub that transformers opens, with the same logits."""
    weights = tmp_path / "start"
    if start == "hub":
        weights = hub
    elif start == "newer names":
        convert(hub, weights, "transformers-v5")
    elif start == "ours":
        convert(hub, weights)
    else:
        convert(hub, weights, "mindspeed", **TREES[start])
        (weights / "mm_convert.json").unlink()  # MindSpeed-MM's own tool leaves none: --data.processor says the heads
    config = configure(weights, hub, tmp_path / "run", "--trained", '["merger", "language:-1"]')
    built, before, _ = run(config, hub, save=True)
    theirs = open_checkpoint(hub)
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in before.items())
    wanted = logits(built.model.eval(), hub)
    folder = export(tmp_path / "run", tmp_path / "weights")
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert ask(model, hub) == pytest.approx(wanted, abs=1e-4)
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (hub / name).read_bytes()
    published, said = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (hub, folder))
    assert said == published | {"torch_dtype": "float32"} or said == published | {"dtype": "float32"}


def test_exports_in_the_form_and_dtype_that_is_asked_for(hub, tmp_path):
    built, _, _ = run(configure(hub, hub, tmp_path / "run"), hub, save=True)
    ours = open_checkpoint(export(tmp_path / "run", tmp_path / "ours", to="mm"))
    assert (ours.layout, ours.dialect) == ("mm", "transformers")
    assert all(torch.equal(ours[name], tensor) for name, tensor in built.parameters.state_dict().items())
    low = open_checkpoint(export(tmp_path / "run", tmp_path / "low", dtype="bfloat16"))
    assert {low.dtype(name) for name in low} == {"BF16"}
    assert json.loads((tmp_path / "low/config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"
    assert build("qwen2.5-vl-tiny", device="meta", **shape_of(hub)).state_dict().keys() == set(low)


def test_a_tied_head_is_one_parameter_of_the_language_model(tmp_path):
    """It has one rate, is counted once, and stays tied in what comes out."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    hub = write_hub_folder(tmp_path / "hub", replace(preset("qwen2.5-vl-tiny"), tied=True))
    tied = ("--architecture", json.dumps(shape_of(hub) | {"tied": True}))
    more = ("--trained", '["language"]', "--optim.rates", '{"model.embed_tokens.*": 5e-4}')
    built, before, rates = run(configure(hub, hub, tmp_path / "run", *tied, *more), hub, save=True)
    assert changed(built, before) == {name for name in before if name.startswith("model.")}
    assert rates[0]["model.embed_tokens.weight"] == 5e-4
    assert f"{before['model.embed_tokens.weight'].numel():,} trained at 0.0005" in built.parts[2]
    folder = export(tmp_path / "run", tmp_path / "weights")
    assert "lm_head.weight" not in open_checkpoint(folder)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert ask(theirs, hub) == pytest.approx(logits(built.model.eval(), hub), abs=1e-4)
    with pytest.raises(ValueError, match=r"--trained 'lm_head.*' names no parameter; there are vision, merger, langua"):
        build_model(configure(hub, hub, tmp_path, *tied, "--trained", '["lm_head.*"]'), None, CPU, continuing=False)


def test_exports_refuse(hub, tmp_path):
    run(configure(hub, hub, tmp_path / "full"), hub, save=True)
    with pytest.raises(ValueError, match=r"holds no adapters .*: leave out --merge"):
        export(tmp_path / "full", tmp_path / "out", merge=True)
    with pytest.raises(ValueError, match=r"cannot write qwen2.5-vl as 'diffusers'; choose one of mm, transformers"):
        export(tmp_path / "full", tmp_path / "out", to="diffusers")
    run(configure(hub, hub, tmp_path / "lora", "--lora.rank", "2"), hub, save=True)
    with pytest.raises(ValueError, match=r"leave out --to and --dtype, or give --merge true for whole weights"):
        export(tmp_path / "lora", tmp_path / "out", to="mm")
    assert not (tmp_path / "out").exists()


def test_rates_may_change_when_a_run_goes_on(hub, tmp_path):
    """Groups fall together or apart, and each keeps its moments."""
    first = configure(hub, hub, tmp_path / "run", "--optim.rates", '{"vision": 1e-4}')
    run(first, hub, save=True)
    for asked in ("{}", '{"vision": 1e-4, "merger": 1e-5}'):
        config = configure(hub, hub, tmp_path / "run", "--optim.rates", asked)
        built = build_model(config, None, CPU, continuing=True)
        optimizer = build_optimizer(built.parameters, config.optim, built.rates)
        checkpoints = Checkpointer(config.run_dir / "checkpoints", 1)
        checkpoints.load(checkpoints.latest(), built.parameters, optimizer, EMA(built.parameters, 0))
        assert all("exp_avg" in optimizer.state[parameter] for parameter in built.parameters.parameters())
