"""The same videos as diffusers makes, from every layout of the weights, whatever else is made beside them."""

import json

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.hooks import apply_first_block_cache
from safetensors.torch import save_file

import mm_infer
from mm_convert import convert, save_checkpoint, save_lora
from mm_infer.weights import Transformer
from mm_models import build
from mm_models.lora import LoRAConfig, add_lora, merge_lora
from mm_models.wan.family import WAN

SMALL = {"height": 32, "width": 48, "frames": 9, "steps": 4}
PROMPT = "A red fox jumps over nine lazy dogs &amp;  sleeps."


class GuidesGrid(UniPCMultistepScheduler):
    """diffusers as MindSpeed-MM pins it, by explicit sigmas."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(sigmas=np.linspace(0.999, 0, num_inference_steps + 1)[:-1], device=device)


def reference(path, guidance: float, scheduler=None, cache: FirstBlockCacheConfig | None = None, **arguments):
    pipe = WanPipeline.from_pretrained(path)
    if cache is not None:
        apply_first_block_cache(pipe.transformer, cache)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler
    kept = {}

    def keep(pipe, step, t, tensors):
        kept["latents"] = tensors["latents"]
        return tensors

    video = pipe(
        PROMPT,
        negative_prompt="blurry",
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(7),
        callback_on_step_end=keep,
        max_sequence_length=512,
        output_type="np",
        **arguments,
    )
    return kept["latents"], video.frames[0]


def difference(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def sampler(pipeline):
    return mm_infer.load(pipeline)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("grid", ["guides", "diffusers"])
def test_equals_the_pipeline_of_diffusers(pipeline, sampler, guidance, grid):
    config = UniPCMultistepScheduler.load_config(pipeline, subfolder="scheduler")
    scheduler = GuidesGrid.from_config(config) if grid == "guides" else None
    latents, frames = reference(pipeline, guidance, scheduler)
    ours = sampler(PROMPT, negative_prompt="blurry", guidance=guidance, grid=grid, seed=7, **SMALL)
    assert ours.latents.shape == (1, 16, 3, 4, 6)
    assert difference(ours.latents, latents) <= 1e-4
    assert ours.frames.shape == (9, 32, 48, 3)
    assert ours.frames.dtype == torch.uint8
    assert np.abs(ours.frames.numpy() - frames * 255).max() <= 1  # half a step of rounding, and the latents' difference


def test_first_block_cache_skips_what_diffusers_skips(pipeline, sampler):
    asked = {"negative_prompt": "blurry", "guidance": 5.0, "grid": "diffusers", "seed": 7, **SMALL}
    whole = sampler(PROMPT, **asked)
    for threshold, skipped in ((0.6, 0.5), (1.0, 0.75)):  # with 1, all calls but the first of each pass
        ours = sampler(PROMPT, first_block_cache=threshold, **asked)
        latents, _ = reference(pipeline, 5.0, cache=FirstBlockCacheConfig(threshold))
        assert difference(ours.latents, latents) <= 1e-4
        assert ours.skipped == skipped
        assert difference(ours.latents, whole.latents) > 1e-3
    again = sampler(PROMPT, **asked)
    assert torch.equal(again.latents, whole.latents)
    assert again.skipped == 0


def test_compiled_layers_make_the_same_video(pipeline, sampler, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    wanted = {"guidance": 1.0, "seed": 7, **SMALL, "steps": 2}
    compiled = mm_infer.load(pipeline, compile=True)(PROMPT, **wanted)
    assert difference(compiled.latents, sampler(PROMPT, **wanted).latents) <= 1e-4


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_and_flow_shift(pipeline, sampler, shift):
    theirs = FlowMatchEulerDiscreteScheduler.from_config(
        UniPCMultistepScheduler.load_config(pipeline, subfolder="scheduler"), shift=shift
    )
    latents, _ = reference(pipeline, 5.0, theirs)
    asked = {"negative_prompt": "blurry", "flow_shift": shift, "grid": "diffusers", "seed": 7, **SMALL}
    assert difference(sampler(PROMPT, sampler="euler", **asked).latents, latents) <= 1e-4


def test_every_input_matters(sampler):
    asked = {"negative_prompt": "blurry", "seed": 7, **SMALL}
    latents = sampler(PROMPT, **asked).latents
    changes = [
        {"negative_prompt": "sharp"},
        {"seed": 8},
        {"guidance": 4.0},
        {"flow_shift": 4.0},
        {"sampler": "euler"},
        {"prompt_template": "{}, at night"},
        {"grid": "diffusers"},
        {"steps": 5},
    ]
    for change in changes:
        assert difference(sampler(PROMPT, **{**asked, **change}).latents, latents) > 1e-4, change
    assert difference(sampler("A cat", **asked).latents, latents) > 1e-3
    framed = sampler("A cat", **asked, prompt_template="({}), at night").latents
    assert torch.equal(framed, sampler("(A cat), at night", **asked).latents)


ODD = ["x", -1, 0, 1.5, True, [], [1], {}, float("nan"), 10**30, "1", [["a"]]]


def test_a_config_that_cannot_be_is_refused_by_name(tmp_path, capsys):
    model = build("wan-tiny-vace")
    save_checkpoint(tmp_path / "W", dict(model.state_dict()), WAN.describe(model.config))
    file = tmp_path / "W/config.json"
    said = json.loads(file.read_text())
    for field, right in said["config"].items():
        for value in ODD:
            if value != right or type(value) is not type(right):
                file.write_text(json.dumps(said | {"config": said["config"] | {field: value}}))
                refused, taken = "", model.config
                try:
                    taken = Transformer(tmp_path / "W", None).config
                except ValueError as error:
                    refused = str(error)
                # A size that could be is no error: the tensors know better, and it is said.
                assert field in refused + capsys.readouterr().err
                assert taken == model.config


def test_given_noise(sampler):
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sampler(PROMPT, latents=noise, **SMALL).latents, sampler(PROMPT, seed=7, **SMALL).latents)
    with pytest.raises(ValueError, match=r"need \(1, 16, 3, 4, 6\)"):
        sampler(PROMPT, latents=noise[:, :, :2], **SMALL)


def test_what_was_made_before_changes_nothing(pipeline, sampler):
    fresh = mm_infer.load(pipeline)
    fresh.encode(["a dog", "a very much longer prompt about two cats", PROMPT])
    fresh("a dog", **SMALL)
    after, alone = fresh(PROMPT, **SMALL), sampler(PROMPT, **SMALL)
    assert torch.equal(after.latents, alone.latents)
    assert torch.equal(after.frames, alone.frames)


@pytest.mark.parametrize("layout", ["mm", "original"])
def test_every_layout_of_the_weights(pipeline, sampler, layout, tmp_path):
    convert(pipeline / "transformer", tmp_path / "W", to=layout)
    ours = mm_infer.load(tmp_path / "W", encoders=pipeline)(PROMPT, **SMALL)
    assert torch.equal(ours.latents, sampler(PROMPT, **SMALL).latents)


def test_bfloat16_keeps_what_is_kept_in_fp32_and_stays_close(pipeline, sampler):
    half = mm_infer.load(pipeline, dtype=torch.bfloat16)
    latents, exact = half(PROMPT, **SMALL).latents, sampler(PROMPT, **SMALL).latents
    dtypes = {name: parameter.dtype for name, parameter in half._model.named_parameters()}
    assert dtypes["blocks.0.modulation"] == dtypes["time_embedding.0.weight"] == torch.float32
    assert dtypes["blocks.0.ffn.0.weight"] == torch.bfloat16
    assert 0 < difference(latents, exact) < 0.1


def test_matrices_in_few_bits_and_on_the_host(pipeline, sampler):
    exact = sampler(PROMPT, **SMALL).latents
    assert torch.equal(mm_infer.load(pipeline, host_layers=3)(PROMPT, **SMALL).latents, exact)
    errors = {}
    for base in ("int8", "nf4"):
        held = mm_infer.load(pipeline, base=base, host_layers=1)
        errors[base] = difference(held(PROMPT, **SMALL).latents, exact)
        assert not any("ffn.0.weight" in name for name in held._model.state_dict())
    assert 0 < errors["int8"] < errors["nf4"] < 0.2
    with pytest.raises(ValueError, match=r"host_layers=4: the model has 3 layers, so it can be 0 … 3"):
        mm_infer.load(pipeline, host_layers=4)


def test_lora(pipeline, sampler, tmp_path):
    model = sampler.weights.load(torch.device("cpu"), torch.float32)
    add_lora(model, LoRAConfig(rank=2, alpha=8.0, targets=("q", "ffn.2")))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = save_lora(tmp_path / "lora", model.state_dict(), 8.0)
    adapted = mm_infer.load(pipeline, lora=folder)(PROMPT, **SMALL).latents
    plain = sampler(PROMPT, **SMALL).latents
    assert difference(adapted, plain) > 1e-2
    held = mm_infer.load(pipeline, lora=folder, base="int8")(PROMPT, **SMALL).latents
    assert 0 < difference(held, adapted) < difference(adapted, plain) / 5

    merge_lora(model)
    save_checkpoint(tmp_path / "merged", model.state_dict(), sampler.config)
    merged = mm_infer.load(tmp_path / "merged", encoders=pipeline)(PROMPT, **SMALL).latents
    assert difference(adapted, merged) < 1e-4


def test_lora_of_comfyui_and_kohya(pipeline, sampler, tmp_path, capsys):
    """The same adapter under the names of others, with an alpha of its own for each linear."""
    generator = torch.Generator().manual_seed(0)
    linears = {"blocks.0.self_attn.q": 4.0, "blocks.0.cross_attn.o": 3.0, "blocks.1.ffn.2": 2.0}
    weights = dict(sampler._model.named_parameters())
    modules = {}
    for rank, name in enumerate(linears, 1):
        height, width = weights[f"{name}.weight"].shape
        modules[name] = torch.randn(rank, width, generator=generator), torch.randn(height, rank, generator=generator)

    def file(path, prefix, dot, said):
        tensors = {}
        for name, (a, b) in modules.items():
            module = prefix + name.replace(".", dot)
            tensors |= {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b * 0.3}
            tensors |= {f"{module}.alpha": torch.tensor(linears[name])} if said else {}
        save_file(tensors, path)
        return mm_infer.load(pipeline, lora=path)(PROMPT, **SMALL).latents

    comfyui = file(tmp_path / "comfyui.safetensors", "diffusion_model.", ".", True)
    assert difference(comfyui, sampler(PROMPT, **SMALL).latents) > 1e-2
    assert torch.equal(file(tmp_path / "kohya.safetensors", "lora_unet_", "_", True), comfyui)
    assert "taken to be the rank" not in capsys.readouterr().err
    assert difference(file(tmp_path / "silent.safetensors", "diffusion_model.", ".", False), comfyui) > 1e-3
    assert "alpha of 3 modules is said nowhere and taken to be the rank" in capsys.readouterr().err

    with torch.no_grad():
        merged = sampler.weights.load(torch.device("cpu"), torch.float32)
        for rank, (name, (a, b)) in enumerate(modules.items(), 1):
            merged.get_parameter(f"{name}.weight").add_(linears[name] / rank * (b * 0.3) @ a)
    save_checkpoint(tmp_path / "merged", merged.state_dict(), sampler.config)
    assert difference(comfyui, mm_infer.load(tmp_path / "merged", encoders=pipeline)(PROMPT, **SMALL).latents) < 1e-4


def test_a_misspelt_option_is_refused(sampler):
    with pytest.raises(ValueError, match="no option guidence, did you mean guidance"):
        sampler(PROMPT, guidence=3.0)
