"""Every task and model makes the latents that diffusers' pipelines make, from the same weights, noise and inputs."""

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVACEPipeline, WanVideoToVideoPipeline
from PIL import Image

import mm_infer
from mm_convert import convert, save_lora, write_experts
from mm_models.encoders import ImageEncoder
from mm_models.lora import LoRAConfig, add_lora

PROMPT, NEGATIVE = "a red fox", "blurry"
SMALL = {"height": 32, "width": 48, "frames": 9, "steps": 4}
LARGE = SMALL | {"height": 64, "width": 32}  # for the 5B


@pytest.fixture(scope="module")
def pixels():
    """pixels(*shape) -> uint8, blobs rather than noise, each call the same."""

    def draw(*shape: int, seed: int = 0) -> np.ndarray:
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (*shape[:-3], shape[-3] // 8, shape[-2] // 8, 3), dtype=np.uint8)
        return coarse.repeat(8, -3).repeat(8, -2)

    return draw


@pytest.fixture(scope="module")
def sampler(tiny):
    """sampler(kind), loaded once."""
    loaded = {}
    return lambda kind: (
        loaded.setdefault(kind, None) or loaded.update({kind: mm_infer.load(tiny(kind))}) or loaded[kind]
    )


def ours(sampler, guidance=4.0, **options):
    options = SMALL | {"negative_prompt": NEGATIVE, "guidance": guidance, "seed": 7, "flow_shift": 3.0} | options
    return sampler(PROMPT, grid="diffusers", **options)


def theirs(cls, path, guidance=4.0, height=32, width=48, embeds=None, **arguments) -> torch.Tensor:
    pipe = cls.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    if embeds is not None:  # the resizing for CLIP is compared in mm_models
        pipe.encode_image = lambda image, device: embeds
    high, low = guidance if isinstance(guidance, tuple) else (guidance, None)
    arguments |= {} if low is None else {"guidance_scale_2": low}
    arguments |= {} if cls is WanVideoToVideoPipeline else {"num_frames": 9}
    return pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=high,
        generator=torch.Generator("cpu").manual_seed(7),
        max_sequence_length=512,
        output_type="latent",
        **arguments,
    ).frames


def difference(a, b) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


def seen(path, *images: np.ndarray) -> torch.Tensor:
    """One sample for each image, as diffusers takes them."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    return ImageEncoder(path).encode(batch)


def test_two_experts(tiny, sampler):
    made = ours(sampler("a14b"), guidance=(4.0, 3.0))
    assert difference(made.latents, theirs(WanPipeline, tiny("a14b"), (4.0, 3.0))) <= 1e-4
    assert made.options.task == "t2v"
    for other in ({"guidance": (3.0, 4.0)}, {"guidance": 4.0}):
        assert difference(ours(sampler("a14b"), **other).latents, made.latents) > 1e-3
    early = mm_infer.load(tiny("a14b"), boundary=0.7)
    assert difference(ours(early, guidance=(4.0, 3.0)).latents, made.latents) > 1e-3


def test_first_frame_clip(tiny, sampler, pixels):
    image = pixels(32, 48, 3)
    expected = theirs(
        WanImageToVideoPipeline, tiny("i2v"), image=Image.fromarray(image), embeds=seen(tiny("i2v"), image)
    )
    made = ours(sampler("i2v"), image=image)
    assert difference(made.latents, expected) <= 1e-4
    assert made.options.task == "i2v"
    middle = theirs(
        WanImageToVideoPipeline, tiny("i2v"), image=Image.fromarray(image), embeds=seen(tiny("i2v"), image[:, 8:40])
    )
    assert difference(ours(sampler("i2v"), image=image, clip_crop=True).latents, middle) <= 1e-4
    assert difference(middle, expected) > 1e-3
    assert difference(ours(sampler("i2v"), image=image // 2).latents, made.latents) > 1e-3


def test_first_and_last_frame_clip(tiny, sampler, pixels):
    first, last = pixels(2, 32, 48, 3)
    expected = theirs(
        WanImageToVideoPipeline,
        tiny("flf2v"),
        image=Image.fromarray(first),
        last_image=Image.fromarray(last),
        embeds=seen(tiny("flf2v"), first, last),
    )
    made = ours(sampler("flf2v"), image=first, last_image=last)
    assert difference(made.latents, expected) <= 1e-4
    assert difference(ours(sampler("flf2v"), image=last, last_image=first).latents, made.latents) > 1e-3


@pytest.mark.parametrize("both", [False, True])
def test_images_and_two_experts(tiny, sampler, pixels, both):
    first, last = pixels(2, 32, 48, 3)
    given = {"image": first, "last_image": last} if both else {"image": first}
    expected = theirs(
        WanImageToVideoPipeline, tiny("a14b-i2v"), **{name: Image.fromarray(one) for name, one in given.items()}
    )
    made = ours(sampler("a14b-i2v"), **given)
    assert difference(made.latents, expected) <= 1e-4
    for name in given:
        assert difference(ours(sampler("a14b-i2v"), **given | {name: 255 - given[name]}).latents, made.latents) > 1e-3


def test_a_timestep_per_token(tiny, sampler, pixels):
    image = pixels(64, 32, 3)
    expected = theirs(WanImageToVideoPipeline, tiny("5b"), height=64, width=32, image=Image.fromarray(image))
    made = ours(sampler("5b"), image=image, **LARGE)
    assert difference(made.latents, expected) <= 1e-4
    assert made.options.task == "ti2v"
    assert made.latents.shape == (1, 48, 3, 4, 2)
    other = ours(sampler("5b"), image=255 - image, **LARGE)
    assert difference(other.latents[:, :, 1:], made.latents[:, :, 1:]) > 1e-3

    pipe = WanPipeline.from_pretrained(tiny("5b"))  # its way to text to video: each token has the same timestep
    assert pipe.config.expand_timesteps
    expected = theirs(WanPipeline, tiny("5b"), height=64, width=32)
    assert difference(ours(sampler("5b"), **LARGE).latents, expected) <= 1e-4


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_video_to_video(tiny, sampler, pixels, strength):
    video = pixels(9, 32, 48, 3)
    expected = theirs(
        WanVideoToVideoPipeline, tiny("t2v"), video=[Image.fromarray(frame) for frame in video], strength=strength
    )
    steps = []
    made = ours(sampler("t2v"), video=video, strength=strength, progress=lambda done, latents: steps.append(done))
    assert difference(made.latents, expected) <= 1e-4
    assert steps == list(range(1, 1 + int(4 * strength)))
    changed = difference(ours(sampler("t2v"), video=255 - video, strength=strength).latents, made.latents)
    assert changed > 1e-3 if strength < 1 else changed < 1e-2  # all noise, almost: sigma is 0.9997


def control(pixels) -> dict:
    """Everything that VACE takes. The references fit without scaling, which diffusers does otherwise."""
    mask = pixels(9, 32, 48, 3, seed=1)
    mask[:] = mask[..., :1]  # grey, and not only black and white
    references = (pixels(32, 48, 3, seed=2), pixels(32, 32, 3, seed=3))
    return {"video": pixels(9, 32, 48, 3), "mask": mask, "references": references}


@pytest.mark.parametrize("given", [(), ("video", "mask"), ("references",), ("video", "mask", "references")])
def test_control(tiny, sampler, pixels, given):
    chosen = {name: value for name, value in control(pixels).items() if name in given}
    named = {name: [Image.fromarray(frame) for frame in frames] for name, frames in chosen.items()}
    if "references" in named:
        named["reference_images"] = named.pop("references")[::-1]  # diffusers puts each in front of the one before
    expected = theirs(WanVACEPipeline, tiny("vace"), conditioning_scale=0.8, **named)
    made = ours(sampler("vace"), control_scale=0.8, **chosen)
    assert difference(made.latents, expected[:, :, len(chosen.get("references", ())) :]) <= 1e-4
    assert made.frames.shape == (9, 32, 48, 3)


def test_control_and_two_experts(tiny, sampler, pixels):
    video = pixels(9, 32, 48, 3)
    expected = theirs(WanVACEPipeline, tiny("a14b-vace"), (4.0, 3.0), video=[Image.fromarray(frame) for frame in video])
    assert difference(ours(sampler("a14b-vace"), (4.0, 3.0), video=video).latents, expected) <= 1e-4


def test_every_part_of_the_control_matters(sampler, pixels):
    all_of_it = control(pixels)
    made = ours(sampler("vace"), **all_of_it).latents
    changes = [
        {"video": np.full_like(all_of_it["video"], 128)},
        {"mask": np.full_like(all_of_it["mask"], 255)},
        {"mask": None},
        {"references": all_of_it["references"][::-1]},
        {"references": all_of_it["references"][:1]},
        {"control_scale": 0.5},
    ]
    for change in changes:
        assert difference(ours(sampler("vace"), **all_of_it | change).latents, made) > 1e-3, change


def test_a_pair_on_disk_in_every_layout(tiny, sampler, tmp_path):
    """diffusers' is what the other tests read."""
    expected = ours(sampler("a14b"), guidance=(4.0, 3.0)).latents
    folders = write_experts(tmp_path / "ours", 0.875)
    for expert, name in (("high", "transformer"), ("low", "transformer_2")):
        convert(tiny("a14b") / name, folders[expert], to="mm")
        convert(tiny("a14b") / name, tmp_path / "original" / f"{expert}_noise_model", to="original")
    for layout in ("ours", "original"):
        pair = mm_infer.load(tmp_path / layout, encoders=tiny("a14b"))
        assert pair.weights.boundary == 0.875  # of the original, as the published are
        assert torch.equal(ours(pair, guidance=(4.0, 3.0)).latents, expected)
    with pytest.raises(ValueError, match=r"boundary 0.8 is for two experts"):
        mm_infer.load(tmp_path / "ours" / "high_noise_model", encoders=tiny("a14b"), boundary=0.8)


def test_adapters_of_a_pair(tiny, sampler, tmp_path):
    pair = sampler("a14b")
    cpu = torch.device("cpu")
    plain = ours(pair).latents
    made = {}
    for number, name in enumerate(("high_noise_model", "low_noise_model")):
        model = add_lora(pair.weights.experts[number].load(pair.config, cpu, torch.float32), LoRAConfig(rank=2))
        torch.manual_seed(number)
        for parameter_name, parameter in model.named_parameters():
            if ".lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        save_lora(tmp_path / "both" / name, model.state_dict(), 16.0)
        made[name] = ours(mm_infer.load(tiny("a14b"), lora=tmp_path / "both" / name)).latents
    both = ours(mm_infer.load(tiny("a14b"), lora=tmp_path / "both")).latents
    for one in (plain, *made.values()):
        assert difference(both, one) > 1e-3
    with pytest.raises(ValueError, match="is for two experts"):
        mm_infer.load(tiny("t2v"), lora=tmp_path / "both")
