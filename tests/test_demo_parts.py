"""The parts of docs/demo that decide whether its figures can be believed: the clips, the codec, the words, the eye."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

DEMO = Path(__file__).parents[1] / "docs/demo"
sys.path.insert(0, str(DEMO))

import answers  # noqa: E402
import causal_codec  # noqa: E402
import clips  # noqa: E402
import codec  # noqa: E402
import edits  # noqa: E402
import images  # noqa: E402
import measure  # noqa: E402
import questions  # noqa: E402
import text  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    clips.write(folder, repeats=1, validation=6)
    return folder


@pytest.fixture(scope="module")
def vae():
    return codec.wan.AutoencoderKLWan.from_pretrained(DEMO / "codec")


@pytest.fixture(scope="module")
def restored(vae) -> torch.Tensor:
    """All 72 combinations through the codec."""
    return codec.reconstruct(vae, codec.demo_clips())


def test_held_out_combinations_show_nothing_new() -> None:
    held_out, training = clips.held_out_combinations(), clips.training_combinations()
    assert len(set(held_out)) == 12
    assert len(set(training)) == 60
    assert not set(held_out) & set(training)
    for name in ("colour", "shape", "direction"):
        assert {getattr(c, name) for c in held_out} == {getattr(c, name) for c in training}


def test_data_set_is_in_the_format_of_the_guides(data: Path) -> None:
    folder, annotation = (data / "data.txt").read_text().strip().split(",")
    entries = json.loads(Path(annotation).read_text())
    assert len(entries) == 60
    assert set(entries[0]) == {"path", "cap", "num_frames", "fps", "resolution"}
    assert {e["cap"] for e in entries} == {c.caption for c in clips.training_combinations()}
    for entry in entries[:3]:
        frames = measure.read_clip(Path(folder) / entry["path"])
        assert len(frames) == entry["num_frames"]
        assert frames.shape[1:3] == (entry["resolution"]["height"], entry["resolution"]["width"])
    held_out = set((data / "held_out.txt").read_text().splitlines())
    assert len(held_out) == 12
    assert not held_out & {e["cap"] for e in entries}


def test_same_seed_same_files(data: Path, tmp_path: Path) -> None:
    clips.write(tmp_path, repeats=1, validation=6)
    for path in sorted(data.glob("videos/*")):
        assert path.read_bytes() == (tmp_path / "videos" / path.name).read_bytes(), path.name
    assert (data / "videos/data_0000.mp4").read_bytes() != (data / "videos/data_0001.mp4").read_bytes()


@pytest.mark.parametrize("name", ["data", "validation"])
def test_the_eye_is_right_on_true_clips(data: Path, name: str) -> None:
    result = measure.measure(measure.asked(data / f"{name}.json", None))
    assert result["totals"] == {"colour": 1, "shape": 1, "direction": 1, "all": 1}


def test_the_eye_is_right_through_the_codec(restored) -> None:
    seen = [measure.look(frames) for frames in codec.to_frames(restored)]
    wrong = [(c, s) for c, s in zip(clips.all_combinations(), seen, strict=True) if not all(s.matches(c).values())]
    assert not wrong


def test_the_eye_sees_nothing_where_there_is_nothing() -> None:
    rng = np.random.default_rng(0)
    assert measure.look(np.full((9, 64, 64, 3), 24, np.uint8)) == measure.Seen(None, None, None, 0.0)
    static = clips.render("square", (225, 40, 40), (32, 32), (0, 0))
    assert measure.look(static).direction is None
    assert measure.look(static).shape == "square"
    grey = clips.render("square", (200, 200, 200), (16, 32), (4, 0))
    assert measure.look(grey).colour is None
    noise = rng.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    assert measure.look(noise).shape is None


def test_generated_clips_must_be_as_many_as_the_prompts(data: Path) -> None:
    with pytest.raises(ValueError, match=r"66 mp4 files, but .* has 12 prompts"):
        measure.asked(data / "videos", data / "held_out.txt")


def test_only_the_image_says_what_moves_and_only_the_prompt_where_to(tmp_path: Path) -> None:
    images.write(tmp_path, repeats=1, validation=2)
    entries = json.loads((tmp_path / "data.json").read_text())
    assert {entry["cap"] for entry in entries} == {f"moving {direction}" for direction in clips.DIRECTIONS}
    asked = json.loads((tmp_path / "held_out.json").read_text())
    assert [entry["shows"] for entry in asked] == [c.caption for c in clips.held_out_combinations()]
    assert all(entry["shows"].endswith(entry["prompt"]) for entry in asked)
    assert (tmp_path / "held_out.txt").read_text().splitlines() == [entry["prompt"] for entry in asked]
    listed = (tmp_path / "held_out_image.txt").read_text().splitlines()
    assert [Path(line) for line in listed] == [tmp_path / entry["image"] for entry in asked]

    drawn = {c: images.draw(c, np.random.default_rng(1)) for c in clips.all_combinations()}
    for combination, frames in drawn.items():
        assert all(measure.look(frames).matches(combination).values())
        others = [f for c, f in drawn.items() if (c.colour, c.shape) == (combination.colour, combination.shape)]
        assert all(np.array_equal(frames[0], other[0]) for other in others)


def test_the_eye_judges_edits_by_what_changed_and_by_what_was_kept(tmp_path: Path) -> None:
    files, rng = edits.Files(tmp_path), np.random.default_rng(0)
    asked = []
    for number, combination in enumerate(clips.held_out_combinations()[::2]):
        frames, mask = edits.draw(combination, rng)
        assert mask.mean() == 0.5
        source, masked = (tmp_path / path for path in files.control(str(number), frames, mask))
        assert np.array_equal(measure.read_clip(masked)[..., 0] >= 128, np.broadcast_to(mask, frames.shape[:3]))
        assert abs(measure.read_clip(source)[:, mask].astype(int) - edits.GREY).max() < 8
        clips.write_clip(tmp_path / f"{number}.mp4", frames)
        given = {"video": [source], "mask": [masked]}
        asked.append(measure.Asked(tmp_path / f"{number}.mp4", "", combination, given))
    assert measure.measure(asked)["totals"] == {"colour": 1, "shape": 1, "direction": 1, "kept": 1, "all": 1}

    other = measure.Asked(asked[1].file, "", asked[0].wanted, asked[0].given)  # of which nothing is right
    (row,) = measure.measure([other])["clips"]
    assert not row["right"]["kept"]
    assert not all(row["right"].values())


def test_edits_are_in_the_format_of_the_guides(tmp_path: Path) -> None:
    from mm_data import read_manifest

    edits.write(tmp_path, repeats=1, validation=2)
    samples = read_manifest(tmp_path / "data.txt")
    assert len(samples) == 60
    referred = [sample for sample in samples if sample.control.references]
    assert 20 < len(referred) < 50
    assert all(path.is_file() for sample in samples for path in sample.files)
    for sample in samples:  # where a reference shows the colour, no word says it
        assert len(sample.captions[0].split()) == (4 if sample in referred else 5)
    words, references = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("words", "references"))
    assert [entry["prompt"] for entry in words] == [c.caption for c in clips.held_out_combinations()]
    assert [entry["prompt"] for entry in references] == [
        f"a {c.shape} moving {c.direction}" for c in clips.held_out_combinations()
    ]
    assert len((tmp_path / "references_references.txt").read_text().splitlines()) == 12


def test_random_clip_tells_images_apart(tmp_path: Path) -> None:
    from mm_models.encoders import ImageEncoder

    text.write(tmp_path, with_image_encoder=True)
    pictures = [edits.reference(c) for c in clips.all_combinations()[::4]]  # each colour and shape once
    tokens = ImageEncoder(tmp_path).encode(torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 127.5 - 1)
    assert tokens.shape == (18, 257, text.IMAGE_DIM)
    apart = torch.cdist(tokens.flatten(1), tokens.flatten(1)) / tokens.flatten(1).norm(dim=1).mean()
    assert (apart + torch.eye(18)).min() > 0.05


def test_every_caption_has_its_own_encoding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, UMT5EncoderModel

    text.write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    captions = [c.caption for c in clips.all_combinations()]
    tokens = tokenizer(captions, return_tensors="pt")
    assert tokens.input_ids.shape == (72, 6)  # five words and </s>: no word is split, none is unknown
    assert tokenizer.unk_token_id not in tokens.input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    with torch.no_grad():
        rows = encoder(**tokens).last_hidden_state
    words = rows[:, [1, 2, 4]]  # colour, shape, direction
    for place, names in enumerate((clips.COLOURS, clips.SHAPES, clips.DIRECTIONS)):
        word = [list(names).index(caption.split()[(1, 2, 4)[place]]) for caption in captions]
        same = torch.tensor([[a == b for b in word] for a in word])
        likeness = torch.cosine_similarity(words[:, None, place], words[None, :, place], dim=-1)
        assert likeness[same].min() > likeness[~same].max()


def test_codec_restores_clips_and_its_latents_are_normalised(vae, restored) -> None:
    assert codec.psnr(codec.demo_clips(), restored) > 30
    video = codec.demo_clips()[::3]
    mean, std = (torch.tensor(getattr(vae.config, name)).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = (vae.encode(video).latent_dist.mode() - mean) / std
    assert latents.shape == (24, 16, 3, 8, 8)
    assert latents.mean().abs() < 0.1
    assert 0.5 < latents.std() < 1.2


def test_whole_clips_equal_diffusers_chunks(vae) -> None:
    video = codec.demo_clips()[:1]
    with torch.no_grad():
        mean = vae.encode(video).latent_dist.mean
        restored = vae.decode(mean).sample
        with codec.whole_clips():
            whole_mean = vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)[0]
            whole_restored = vae.decoder(vae.post_quant_conv(mean)).clamp(-1, 1)
    torch.testing.assert_close(whole_mean, mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole_restored, restored, rtol=0, atol=1e-4)


def test_the_causal_codec_keeps_what_clips_show() -> None:
    """12 of the combinations, through the files that are shipped; their latents are normalised."""
    vae, video = causal_codec.load(DEMO / "causal_codec"), codec.demo_clips()[::6]
    restored = causal_codec.reconstruct(vae, video)
    assert codec.psnr(video, restored) > 29
    for frames, combination in zip(codec.to_frames(restored), clips.all_combinations()[::6], strict=True):
        assert all(measure.look(frames).matches(combination).values())
    with torch.no_grad():
        latents = torch.cat([vae.encode(some)[0] for some in video.split(8)]) * causal_codec.SCALE
    assert latents.shape == (12, 4, 3, 8, 8)
    assert 0.8 < latents.std() < 1.2


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    questions.write(folder, 20)
    return folder


def test_questions_never_tell_what_is_held_out(asked: Path) -> None:
    held_out = {" ".join(pair) for pair in questions.held_out_pairs()}
    assert {shape for _, shape in questions.held_out_pairs()} == set(clips.SHAPES)
    for name in ("train", "validation", "held_out"):
        entries = json.loads((asked / f"{name}.json").read_text())
        assert len({entry["kind"] for entry in entries}) == 7
        said = " ".join(message["content"] for entry in entries for message in entry["messages"])
        named = {pair for pair in map(" ".join, questions.PAIRS) if pair in said}
        assert named <= held_out if name == "held_out" else not named & held_out


def test_questions_are_conversations_of_the_guide(asked: Path) -> None:
    from mm_data.conversations import Box, Source, read_conversations

    entries = json.loads((asked / "held_out.json").read_text())
    conversations = read_conversations([Source(asked / "held_out.json")])
    assert len(conversations) == len(entries)
    for entry, conversation in zip(entries, (conversations[i] for i in range(len(entries))), strict=True):
        assert [one.kind for one in conversation.media] == ["image"] * len(entry["images"]) + ["video"] * len(
            entry["videos"]
        )
        for box in (part for turn in conversation.turns for part in turn.parts if isinstance(part, Box)):
            picture = np.asarray(Image.open(conversation.media[box.media].path), float)
            differs = np.abs(picture - picture[0, 0]).max(-1) > 45
            rows, columns = np.nonzero(differs)
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.subtract(edges, box.numbers)).max() <= 2


@pytest.mark.parametrize(
    ("answer", "wanted", "right", "overlap"),
    [
        ("red ", "red", True, None),
        ("reddish", "red", False, None),
        ("[0, 0, 10, 10]", "[0, 0, 10, 10]", True, 1.0),
        ("[0, 0, 10, 5]", "[0, 0, 10, 10]", True, 0.5),
        ("[5, 5, 15, 15]", "[0, 0, 10, 10]", False, 25 / 175),
        ("[10, 10, 0, 0]", "[0, 0, 10, 10]", False, 0.0),
        ("[0, 0, 10]", "[0, 0, 10, 10]", False, 0.0),
        ("red", "[0, 0, 10, 10]", False, 0.0),
    ],
)
def test_answers_are_judged(answer: str, wanted: str, right: bool, overlap: float | None) -> None:
    assert answers.judge(answer, wanted) == (right, overlap)
