"""Adapters made here compute the same in diffusers, whatever the model, and come back whole from every format."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from mm_convert import open_lora, save_checkpoint, save_lora, write_experts
from mm_convert.cli import main
from mm_convert.store.safetensors import read_file
from mm_models import build
from mm_models.lora import LoRAConfig, Weighted, add_lora, load_adapters, load_lora, lora_state_dict

SMALL = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 3, "text_dim": 16}
USUAL = ("q", "k", "v", "o", "ffn.0", "ffn.2")
MODELS = {  # fields, targets besides the usual, adapted linears
    "i2v": ({"in_channels": 36, "image_dim": 20}, ("k_img", "v_img"), 3 * 12),
    "5B": ({"in_channels": 48, "out_channels": 48}, (), 3 * 10),
    "vace": ({"vace_layers": (0, 2)}, ("before_proj", "after_proj"), 5 * 10 + 3),
}


def randomise(parameters, scale):
    for parameter in parameters:
        parameter.data.normal_(0, scale)


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """A model under diffusers' names, an adapter for it in our form, inputs, and what the adapted model computes."""
    fields, more, count = MODELS[request.param]
    place = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = build("wan-tiny", **SMALL, **fields)
    randomise(model.parameters(), 0.2)
    c = model.config
    save_checkpoint(place / "transformer", model.state_dict(), c, to="diffusers")
    inputs = {"video": torch.randn(2, c.in_channels, 3, 4, 6), "t": torch.tensor([999.0, 250.0])}
    inputs["text"] = torch.randn(2, 512, 16)
    if c.image_dim:
        inputs["image"] = torch.randn(2, 257, c.image_dim)
    if c.vace_layers:
        inputs |= {"control": torch.randn(2, 96, 3, 4, 6), "control_scale": (1.0, 0.5)}
    if request.param == "5B":
        inputs["t"] = inputs["t"][:, None].repeat(1, 18)
        inputs["t"][:, :6] = 0
    plain = model(**inputs).detach()

    add_lora(model, LoRAConfig(rank=4, alpha=6.0, targets=(*USUAL, *more)))
    randomise((p for p in model.parameters() if p.requires_grad), 0.3)
    assert len(lora_state_dict(model)) == 2 * count
    save_lora(place / "adapter", model.state_dict(), 6.0)
    adapted = model(**inputs).detach()
    assert relative(plain, adapted) > 0.1
    return place, model, inputs, adapted


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


class ExactSinusoid(torch.nn.Module):
    """diffusers' own, in float32, is off by up to 3e-5 for want of bits; this is the same in float64."""

    def forward(self, t):
        angles = t.double()[:, None] * 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def pipeline_of(**transformers):
    """diffusers' pipeline of these transformers alone."""
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    vace = any(isinstance(model, diffusers.WanVACETransformer3DModel) for model in transformers.values())
    return (diffusers.WanVACEPipeline if vace else diffusers.WanPipeline)(**transformers, **nothing)


def outputs(transformer, inputs):
    """What a transformer of diffusers makes of our inputs."""
    transformer.condition_embedder.timesteps_proj = ExactSinusoid()
    more = {"encoder_hidden_states_image": inputs.get("image")}
    if "control" in inputs:
        scale = torch.tensor(inputs["control_scale"])
        more |= {"control_hidden_states": inputs["control"], "control_hidden_states_scale": scale}
    with torch.no_grad():
        return transformer(inputs["video"], inputs["t"], inputs["text"], **more, return_dict=False)[0]


def in_diffusers(place, inputs, load):
    """What diffusers computes from its files, with an adapter that `load` puts into the pipeline."""
    kind = diffusers.WanVACETransformer3DModel if "control" in inputs else diffusers.WanTransformer3DModel
    pipeline = pipeline_of(transformer=kind.from_pretrained(place / "transformer"))
    load(pipeline)
    return outputs(pipeline.transformer, inputs)


def test_the_same_in_diffusers(made):
    """By the file that diffusers looks for, loaded as its pipelines load it; and by the model's own loader."""
    place, _, inputs, adapted = made
    main(["convert", str(place / "adapter"), str(place / "for-diffusers"), "--to", "diffusers"])
    folder = place / "for-diffusers"
    assert relative(in_diffusers(place, inputs, lambda p: p.load_lora_weights(folder)), adapted) <= 1e-5
    file = "pytorch_lora_weights.safetensors"
    out = in_diffusers(place, inputs, lambda p: p.transformer.load_lora_adapter(folder, weight_name=file))
    assert relative(out, adapted) <= 1e-5


def test_the_same_by_comfyuis_names(made):
    """diffusers reads them too, but for VACE; there the names are those of the original files, as ComfyUI has them."""
    place, model, inputs, adapted = made
    file = place / "comfyui.safetensors"
    main(["convert", str(place / "adapter"), str(file), "--to", "comfyui"])
    if "control" not in inputs:
        assert relative(in_diffusers(place, inputs, lambda p: p.load_lora_weights(file)), adapted) <= 1e-5
    linears = {name.rpartition(".lora_")[0] for name in lora_state_dict(model)}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(read_file(file)[0]) == {f"diffusion_model.{name}.{part}" for name in linears for part in parts}


def test_every_format_and_back(made):
    place, model, _, _ = made
    ours = lora_state_dict(model)
    for form in ("diffusers", "comfyui", "mindspeed", "peft"):
        there, back = place / f"there-{form}", place / f"back-{form}"
        main(["convert", str(place / "adapter"), str(there), "--to", form])
        main(["convert", str(there), str(back)])
        c = model.config
        fields = {name: getattr(c, name) for name in ("in_channels", "out_channels", "image_dim", "vace_layers")}
        other = build("wan-tiny", **SMALL, **fields)
        adapter = open_lora(back)
        assert (adapter.rank, adapter.alpha) == (4, 6.0), form
        load_lora(other, adapter, adapter.alphas)
        theirs = lora_state_dict(other)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items()), form


def test_the_adapters_of_two_experts(tmp_path):
    """Both experts and both adapters, each as one directory, are what diffusers opens as its two transformers."""
    torch.manual_seed(0)
    weights, adapters = (write_experts(tmp_path / name, 0.875) for name in ("pair", "adapters"))
    inputs = {"video": torch.randn(1, 16, 3, 4, 6), "t": torch.tensor([900.0]), "text": torch.randn(1, 512, 16)}
    expected = {}
    for expert in ("high", "low"):
        model = build("wan-tiny-a14b", **SMALL)
        randomise(model.parameters(), 0.2)
        save_checkpoint(weights[expert], model.state_dict(), model.config)
        add_lora(model, LoRAConfig(rank=4, alpha=6.0, targets=USUAL))
        randomise((p for p in model.parameters() if p.requires_grad), 0.3)
        save_lora(adapters[expert], model.state_dict(), 6.0)
        expected[expert] = model(**inputs).detach()
    for name in ("pair", "adapters"):
        main(["convert", str(tmp_path / name), str(tmp_path / f"{name}-diffusers"), "--to", "diffusers"])

    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pair-diffusers", **nothing)
    assert pipeline.config.boundary_ratio == 0.875
    folder = tmp_path / "adapters-diffusers"
    pipeline.load_lora_weights(folder / "transformer")
    pipeline.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)
    assert relative(outputs(pipeline.transformer, inputs), expected["high"]) <= 1e-5
    assert relative(outputs(pipeline.transformer_2, inputs), expected["low"]) <= 1e-5
    assert relative(expected["high"], expected["low"]) > 0.1


# --- distilled adapters, and several at once, as diffusers applies them


def write_comfyui(file, model, seed, whole):
    """In ComfyUI's names, of ranks and alphas that differ; with the whole differences that diffusers takes."""
    random = torch.Generator().manual_seed(seed)
    linears = [name for name in dict(model.named_modules()) if name.rpartition(".")[2] in "qkvo" and "attn" in name]
    linears += [f"blocks.{i}.ffn.{n}" for i in range(3) for n in (0, 2)]
    linears += [f"{name}.{n}" for name in ("text_embedding", "time_embedding") for n in (0, 2)] + ["time_projection.1"]
    tensors = {}
    for number, name in enumerate(linears):
        weight, rank = model.get_parameter(f"{name}.weight"), 1 + number % 3
        shapes = {"down": (rank, weight.shape[1]), "up": (len(weight), rank)}
        for part, shape in shapes.items():
            tensors[f"diffusion_model.{name}.lora_{part}.weight"] = torch.randn(shape, generator=random) * 0.3
        if name.startswith("blocks"):
            tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(1 + number % 4))
        if whole:
            tensors[f"diffusion_model.{name}.diff_b"] = torch.randn(len(weight), generator=random) * 0.3
    if whole:
        head = model.get_parameter("head.head.weight")
        tensors["diffusion_model.head.head.diff"] = torch.randn(head.shape, generator=random) * 0.3
        tensors["diffusion_model.head.head.diff_b"] = torch.randn(len(head), generator=random) * 0.3
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    model = build("wan-tiny", **SMALL)
    randomise(model.parameters(), 0.2)
    save_checkpoint(place / "transformer", model.state_dict(), model.config, to="diffusers")
    inputs = {"video": torch.randn(1, 16, 3, 4, 6), "t": torch.tensor([900.0]), "text": torch.randn(1, 512, 16)}
    return place, model, inputs


def weighted(file, strength=1.0):
    adapter = open_lora(file)
    return Weighted(adapter, adapter.alphas, adapter.differences, strength)


def copy_of(model):
    other = build("wan-tiny", **SMALL)
    other.load_state_dict(model.state_dict())
    return other


def test_a_distilled_adapter_computes_the_same_in_diffusers(plain):
    """Its whole differences too, of all biases and of the head; and merged into the base by us."""
    place, model, inputs = plain
    file = write_comfyui(place / "distilled.safetensors", model, 1, whole=True)
    ours = load_adapters(copy_of(model), [weighted(file)])(**inputs).detach()
    assert relative(model(**inputs).detach(), ours) > 0.1
    assert relative(in_diffusers(place, inputs, lambda p: p.load_lora_weights(file)), ours) <= 1e-5
    main(["convert", str(place / "transformer"), str(place / "merged"), "--lora", str(file), "--to", "diffusers"])
    merged = diffusers.WanTransformer3DModel.from_pretrained(place / "merged")
    assert relative(outputs(merged, inputs), ours) <= 1e-5


def test_several_adapters_are_the_sum_that_diffusers_makes(plain):
    place, model, inputs = plain
    files = [write_comfyui(place / f"{n}.safetensors", model, n, whole=n == 2) for n in (2, 3)]
    strengths = (0.8, -0.5)
    ours = load_adapters(copy_of(model), list(map(weighted, files, strengths)))(**inputs).detach()

    def load(pipeline):
        for name, file in zip("ab", files, strict=True):
            pipeline.load_lora_weights(file, adapter_name=name)
        pipeline.set_adapters(["a", "b"], list(strengths))

    assert relative(in_diffusers(place, inputs, load), ours) <= 1e-5
    for alone in zip(files, strengths, strict=True):
        assert relative(load_adapters(copy_of(model), [weighted(*alone)])(**inputs).detach(), ours) > 0.05


def test_norms_modulation_and_patches_change_whole(plain):
    """diffusers passes these over; as ComfyUI does it, they are added to the parameters."""
    place, model, inputs = plain
    names = {
        "blocks.1.norm3.weight": "blocks.1.norm3.diff",
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.2.modulation": "blocks.2.diff_m",
        "head.modulation": "head.diff_m",
        "patch_embedding.weight": "patch_embedding.diff",
        "patch_embedding.bias": "patch_embedding.diff_b",
    }
    shapes = {ours: model.get_parameter(ours).shape for ours in names}
    drawn = {ours: torch.randn(shape, generator=torch.Generator().manual_seed(4)) for ours, shape in shapes.items()}
    file = place / "whole.safetensors"
    save_file({f"diffusion_model.{theirs}": drawn[ours] for ours, theirs in names.items()}, file)
    expected = copy_of(model)
    with torch.no_grad():
        for name, difference in drawn.items():
            expected.get_parameter(name).add_(0.5 * difference)
    ours = load_adapters(copy_of(model), [weighted(file, 0.5)])(**inputs)
    assert torch.equal(ours, expected(**inputs))
