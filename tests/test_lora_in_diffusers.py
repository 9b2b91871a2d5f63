"""Adapters made here compute the same in diffusers, whatever the model, and come back whole from every format."""

import pytest
import torch

from mm_convert import save_checkpoint
from mm_convert.cli import main
from mm_convert.store.safetensors import read_file
from mm_models import build
from mm_models.lora import LoRAConfig, add_lora, load_lora, lora_state_dict, save_lora

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
    save_lora(model, place / "adapter")
    adapted = model(**inputs).detach()
    assert relative(plain, adapted) > 0.1
    return place, model, inputs, adapted


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def in_diffusers(place, inputs, load):
    """What diffusers computes from its files, with an adapter that `load` puts into the pipeline."""
    import diffusers

    vace = "control" in inputs
    transformer = (diffusers.WanVACETransformer3DModel if vace else diffusers.WanTransformer3DModel).from_pretrained(
        place / "transformer"
    )
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = (diffusers.WanVACEPipeline if vace else diffusers.WanPipeline)(transformer=transformer, **nothing)
    load(pipeline)
    more = {"encoder_hidden_states_image": inputs.get("image")}
    if vace:
        scale = torch.tensor(inputs["control_scale"])
        more |= {"control_hidden_states": inputs["control"], "control_hidden_states_scale": scale}
    with torch.no_grad():
        return transformer(inputs["video"], inputs["t"], inputs["text"], **more, return_dict=False)[0]


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
        config = load_lora(other, back)
        assert (config.rank, config.alpha) == (4, 6.0), form
        theirs = lora_state_dict(other)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items()), form
