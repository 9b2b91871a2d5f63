"""What a model is told besides noise and text: shapes and formulas, and that every piece of it matters."""

import pytest
import torch
import torch.nn.functional as F

from mm_models import preset
from mm_models.diffusion.objective import Pixels
from mm_models.wan import WanConfig
from mm_models.wan import encode as c
from mm_models.wan.encode import Conditioning, fold_mask, keep_mask, split_by_mask
from mm_models.wan.tasks import CONDITION, stored, tasks

HEIGHT, WIDTH = 16, 24


def test_what_each_model_can_be_asked_for():
    usual = {
        "wan2.1-t2v-14b": ("t2v", "ti2v", "v2v"),
        "wan2.2-ti2v-5b": ("t2v", "ti2v", "v2v"),
        "wan2.1-i2v-14b-720p": ("i2v",),
        "wan2.1-flf2v-14b": ("flf2v",),
        "wan2.2-i2v-a14b": ("i2v", "flf2v"),
        "vace-a14b": ("vace",),
    }
    assert {name: tuple(task.name for task in tasks(preset(name))) for name in usual} == usual
    assert stored(preset("wan2.1-i2v-1.3b"), "i2v") == {"condition": 16, "image": 257}
    assert stored(preset("wan2.1-flf2v-14b"), "flf2v") == {"condition_both": 16, "image": 514}
    assert stored(preset("wan2.2-i2v-a14b"), "i2v") == {"condition": 16}
    assert stored(preset("vace-14b"), "vace") == {"control": 32, "control_mask": 64}
    assert not any(stored(preset("wan2.2-ti2v-5b"), task) for task in ("t2v", "ti2v", "v2v"))


def test_the_frames_that_a_mask_is_folded_to():
    """81 pixel frames to 21 latent frames: the middle ones, not one of each group of four. Others as torch chooses."""
    by_frame = torch.arange(81.0).view(1, 1, 81, 1, 1).expand(1, 1, 81, HEIGHT, WIDTH)
    folded = fold_mask(by_frame, 21)
    assert folded.shape == (1, 64, 21, HEIGHT // 8, WIDTH // 8)
    assert (folded == folded[:, :1, :, :1, :1]).all()
    chosen = folded[0, 0, :, 0, 0].int().tolist()
    assert chosen[:10] + chosen[-1:] == [1, 5, 9, 13, 17, 21, 25, 28, 32, 36, 79]
    for frames in range(1, 200, 4):
        positions = torch.arange(float(frames)).view(1, 1, frames, 1, 1)
        expected = F.interpolate(positions, ((frames - 1) // 4 + 1, 1, 1), mode="nearest-exact")
        folded = fold_mask(positions.expand(1, 1, frames, 8, 8), (frames - 1) // 4 + 1)
        assert torch.equal(folded[:, :1], expected), frames


def test_the_channels_that_a_mask_is_folded_to():
    """Channel 8 · row + column of the pixel in its square, by sample; from a mask that lies in memory anyhow."""
    mask = torch.arange(2 * HEIGHT * WIDTH).float().view(2, 1, 1, WIDTH, HEIGHT).transpose(3, 4)
    folded = fold_mask(mask, 1)
    for sample, channel, row, column in ((0, 0, 0, 0), (1, 7, 0, 1), (0, 8, 1, 2), (1, 43, 1, 0)):
        pixel = mask[sample, 0, 0, 8 * row + channel // 8, 8 * column + channel % 8]
        assert folded[sample, channel, 0, row, column] == pixel


@pytest.mark.parametrize("last", [False, True])
def test_the_mask_of_given_frames_as_diffusers_makes_it(last):
    """Its formula, by pixel frames: the first counts four times, and every four are the channels of a latent frame."""
    pixels = torch.zeros(2, 1, 17, 3, 4)
    pixels[:, :, 0] = 1
    pixels[:, :, -1] = float(last)
    padded = torch.cat((pixels[:, :, :1].repeat_interleave(4, dim=2), pixels[:, :, 1:]), dim=2)
    expected = padded.view(2, 5, 4, 3, 4).transpose(1, 2)
    assert torch.equal(keep_mask(torch.randn(2, 16, 5, 3, 4), last), expected)


def test_what_is_encoded():
    first, last = torch.rand(2, 3, 4, 6), torch.rand(2, 3, 4, 6)
    video = c.condition_video(9, first, last)
    assert video.shape == (2, 3, 9, 4, 6)
    assert torch.equal(video[:, :, 0], first)
    assert torch.equal(video[:, :, -1], last)
    assert not video[:, :, 1:-1].any()
    assert not c.condition_video(9, first)[:, :, 1:].any()

    video, mask = torch.rand(1, 3, 5, 4, 6) - 2, torch.rand(1, 1, 5, 4, 6)
    kept, changed = split_by_mask(video, mask)
    assert torch.equal(kept, torch.where(mask > 0.5, 0, video))
    assert torch.equal(kept + changed, video)


def test_references_come_first_in_the_order_given():
    control, mask = torch.rand(1, 32, 3, 2, 4), torch.rand(1, 64, 3, 2, 4)
    references = [torch.rand(1, 16, 1, 2, 4) for _ in range(2)]
    longer, longer_mask = c.with_references(control, mask, references)
    assert (longer.shape, longer_mask.shape) == ((1, 32, 5, 2, 4), (1, 64, 5, 2, 4))
    for i, reference in enumerate(references):
        assert torch.equal(longer[:, :16, i], reference[:, :, 0])
    assert not longer[:, 16:, :2].any()
    assert not longer_mask[:, :, :2].any()
    assert torch.equal(longer[:, :, 2:], control)
    assert torch.equal(longer_mask[:, :, 2:], mask)
    assert c.with_references(control, mask, []) == (control, mask)


def test_a_given_first_frame():
    latents, first = torch.rand(2, 48, 3, 4, 6), torch.rand(2, 48, 1, 4, 6)
    ti2v, t2v = (Conditioning(preset("wan2.2-ti2v-5b"), task) for task in ("ti2v", "t2v"))
    held = ti2v.hold(latents, {"first": first})
    assert torch.equal(held[:, :, :1], first)
    assert torch.equal(held[:, :, 1:], latents[:, :, 1:])
    assert t2v.hold(latents, {}) is latents
    assert torch.equal(ti2v.complete(latents, {})["first"], latents[:, :, :1])
    t = c.first_frame_at_zero(torch.tensor([900.0, 30.0]), (3, 4, 6), (1, 2, 2))
    assert t.shape == (2, 18)
    assert not t[:, :6].any()
    assert torch.equal(t[:, 6:], torch.tensor([[900.0], [30.0]]).expand(2, 12))
    assert torch.equal(ti2v.learned(latents), latents[:, :, 1:])
    for model in ("wan2.2-ti2v-5b", "wan2.2-i2v-a14b", "wan2.1-flf2v-14b", "vace-14b"):
        others = [Conditioning(preset(model), task.name) for task in tasks(preset(model)) if task.name != "ti2v"]
        assert all(other.learned(latents) is latents for other in others)


def test_two_images_are_known_by_their_positions_not_by_the_number_of_tokens():
    """A small CLIP makes 17 tokens of an image: 34 with positions are a first and a last image."""
    small = {"in_channels": 36, "image_dim": 32}
    assert [t.name for t in tasks(WanConfig(**small, image_tokens=34, image_positions=True))] == ["flf2v"]
    assert [t.name for t in tasks(WanConfig(**small, image_tokens=34))] == ["i2v"]
    assert [t.name for t in tasks(WanConfig(**small, image_tokens=1370, image_positions=False))] == ["i2v"]


def test_training_stores_what_inference_makes():
    """One function makes conditions for both; what training keeps of them is what the model is told again."""
    pixels = Pixels(
        size=(5, 16, 24),
        video=torch.rand(2, 3, 5, 16, 24) * 2 - 1,
        mask=torch.rand(2, 1, 5, 16, 24).round(),
        references=[(torch.rand(3, 16, 24),), ()],
    )

    def encode(video):
        return F.avg_pool3d(video, (1, 8, 8)).mean(1, keepdim=True).expand(-1, 16, -1, -1, -1)[:, :, ::4]

    vace = Conditioning(preset("vace-14b"), "vace")
    with_reference, without = vace.encode(pixels, encode)
    assert with_reference["control"].shape == (32, 3, 2, 3)
    assert without["control"].shape == (32, 2, 2, 3)
    kept = vace.to_store(torch.rand(16, 2, 2, 3), with_reference)
    assert torch.equal(kept["latents"][:, 0], with_reference["control"][:16, 0])
    assert kept["latents"].shape == (16, 3, 2, 3)
    assert kept["control_mask"].dtype == torch.uint8
    assert set(kept) == {"latents", *vace.stored}
    told = [
        vace.inputs(kept["latents"][None], torch.zeros(1), torch.zeros(1, 3, 8), {n: t[n][None] for n in vace.stored})
        for t in (kept, with_reference)
    ]
    assert torch.allclose(told[0]["control"], told[1]["control"], atol=1 / 255)


MODELS = {
    "t2v": {},
    "i2v": {"in_channels": 36, "image_dim": 20},
    "flf2v": {"in_channels": 36, "image_dim": 20, "image_tokens": 514},
    "ti2v": {"in_channels": 48, "out_channels": 48},
    "vace": {"vace_layers": (0, 2)},
}


@pytest.mark.parametrize("task", MODELS)
def test_every_condition_matters(tiny, task):
    """Each set to zero, in one sample: that one changes, its neighbour does not."""
    model = tiny(text_tokens=40, **MODELS[task])
    config, random = model.config, torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.randn(2, *shape, generator=random)

    channels = config.out_channels
    latents, text, t = rand(channels, 3, 4, 6), rand(20, 16), torch.tensor([900.0, 300.0])
    latent = (channels, 3, 4, 6)
    shapes = {name: latent for name in CONDITION.values()}
    shapes |= {"control": (2 * channels, 3, 4, 6), "image": (config.image_tokens, 20)}
    given = {name: rand(*shapes[name]) for name in stored(config, task) if name in shapes}
    if task == "ti2v":
        given["first"] = rand(channels, 1, 4, 6)
    if task == "vace":
        given["control_mask"] = torch.randint(256, (2, 64, 3, 4, 6), generator=random).byte()
    parts = {name: (name, slice(None)) for name in given}
    if task == "vace":
        parts |= {"what is kept": ("control", slice(16)), "what changes": ("control", slice(16, None))}
        parts |= {"a reference": ("control", (slice(16), slice(1)))}  # stands in the first frame

    conditioning = Conditioning(config, task)

    def run(conditions):
        with torch.no_grad():
            return model(**conditioning.inputs(conditioning.hold(latents, conditions), t, text, conditions))

    out = run(given)
    for what, (name, part) in parts.items():
        changed = given[name].clone()
        changed[0][part] = 0
        new = run(given | {name: changed})
        assert (new[0] - out[0]).norm() > 3e-3 * out[0].norm(), what
        assert torch.allclose(new[1], out[1], atol=1e-5), what
    if task == "vace":  # bytes, or numbers
        assert torch.allclose(run(given | {"control_mask": given["control_mask"] / 255}), out, atol=1e-6)
