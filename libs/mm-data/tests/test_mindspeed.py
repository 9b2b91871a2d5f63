"""Folders written by MindSpeed-MM's extraction, rebuilt from the description of their format."""

import itertools
import json
import os

import pytest
import torch

from mm_data import FeatureDataset, build_loader


def text(length, leading):
    mask = torch.zeros(*leading, 512, dtype=torch.int64)
    mask[..., :length] = 1
    return torch.arange(512.0).repeat(4, 1).T.expand(*leading, 512, 4).clone().bfloat16(), mask


def write(path, generation, count=4):
    (path / "features").mkdir(parents=True)
    lines = []
    for i in range(count):
        latents = torch.full((16, 3, 4, 6), float(i)).bfloat16()
        prompt, mask = text(5 + i, (1,) if i % 2 else ())
        mask_then_latents = torch.cat((torch.ones(4, 3, 4, 6), torch.full((16, 3, 4, 6), float(10 + i))))
        extras = {
            "i2v_clip_feature": torch.full((257, 8), float(20 + i)),
            "i2v_vae_feature": mask_then_latents,
            "first_frame_latents": torch.zeros(16, 1, 4, 6),
        }
        name = f"features/video{i}_mp4.pt"
        if generation == 1:
            torch.save({"latents": latents, "prompt": prompt, "prompt_mask": mask, **extras}, path / name)
            lines.append({"path": name, "cap": "x"})
        else:
            torch.save({"video": latents, "prompt_ids": prompt, "prompt_mask": mask, **extras}, path / name)
            lines.append({"path": f"videos/video{i}.mp4", "file": name, "cap": "x"})
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("generation", [1, 2])
def test_both_generations(tmp_path, generation):
    write(tmp_path / "out", generation)
    dataset = FeatureDataset(tmp_path / "out")
    assert dataset.buckets == [(16, 3, 4, 6)] * 4
    assert dataset[2]["latents"].mean() == 2
    assert [dataset[i]["text"][0].shape for i in range(4)] == [(5 + i, 4) for i in range(4)]
    assert set(dataset[0]["conditions"]) == {"image", "condition"}
    assert dataset.empty_text is None
    (step,) = itertools.islice(build_loader(dataset, global_batch=4, micro_batch=4), 1)
    (batch,) = step.micro
    assert batch.tensors["text"].shape == (4, 8, 4)
    lengths = 5 + batch.tensors["latents"][:, 0, 0, 0, 0].int()  # as the masks of the files say
    assert torch.equal(batch.tensors["text_mask"].sum(1), lengths)
    assert torch.equal(batch.tensors["text_mask"], torch.arange(8) < lengths[:, None])
    assert batch.tensors["image"].shape == (4, 257, 8)
    assert batch.tensors["condition"].shape == (4, 16, 3, 4, 6)
    assert torch.equal(batch.tensors["condition"][:, 0, 0, 0, 0], 10 + batch.tensors["latents"][:, 0, 0, 0, 0])
    assert torch.equal(batch.tensors["image"][:, 0, 0], 20 + batch.tensors["latents"][:, 0, 0, 0, 0])


def test_vace_context_is_parted(tmp_path):
    write(tmp_path, 2, count=1)
    file = tmp_path / "features" / "video0_mp4.pt"
    prompt, mask = text(5, ())
    parts = torch.cat([torch.full((c, 3, 4, 6), float(n)) for n, c in enumerate((16, 16, 64))])
    found = {"video": torch.zeros(16, 3, 4, 6), "prompt_ids": prompt, "prompt_mask": mask, "vace_context": parts}
    torch.save(found, file)
    conditions = FeatureDataset(tmp_path)[0]["conditions"]
    assert {name: tensor.shape[0] for name, tensor in conditions.items()} == {"control": 32, "control_mask": 64}
    assert torch.cat((conditions["control"], conditions["control_mask"])).equal(parts)
    torch.save(found | {"vace_context": parts[:95]}, file)
    with pytest.raises(ValueError, match="vace_context has 95 channels, expected 96"):
        FeatureDataset(tmp_path)


def test_accidents_of_the_writer_are_told(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "features" / "video3_mp4.pt").unlink()
    lines = (tmp_path / "data.jsonl").read_text()
    (tmp_path / "data.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
    with pytest.warns(UserWarning, match="files") as told:
        dataset = FeatureDataset(tmp_path)
    assert len(dataset) == 3
    assert "5 samples share 4 files" in str(told[0].message)
    assert "1 listed files were never written, e.g. features/video3_mp4.pt" in str(told[1].message)


def test_damage_is_named(tmp_path):
    write(tmp_path, 2)
    file = tmp_path / "features" / "video1_mp4.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"video1_mp4\.pt is damaged"):
        FeatureDataset(tmp_path)
    torch.save({"something": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="expected one of"):
        FeatureDataset(tmp_path)


def test_what_changes_while_it_is_read_and_odd_lines_are_one_line(tmp_path):
    write(tmp_path, 2)
    dataset = FeatureDataset(tmp_path)
    file = tmp_path / "features" / "video1_mp4.pt"
    file.unlink()
    with pytest.raises(ValueError, match=r"video1_mp4\.pt is not there: extract again"):
        dataset[1]
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"video1_mp4\.pt is a named pipe"):
        dataset[1]
    file.unlink()
    torch.save([1], file)
    with pytest.raises(ValueError, match=r"video1_mp4\.pt is no feature file: it holds a list"):
        dataset[1]
    for line in ("[]", '{"file": 3}', '{"path": "a.mp4"}'):
        (tmp_path / "data.jsonl").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=r"data\.jsonl, line 1: neither file nor path names a \.pt file"):
            FeatureDataset(tmp_path)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"video": 5}, "video is a int, not a tensor"),
        ({"video": torch.zeros(16, 24)}, r"video has the shape \[16, 24\], not 4 dims"),
        ({"video": torch.zeros(2, 16, 3, 4, 6)}, r"video has the shape \[2, 16, 3, 4, 6\], not 4 dims"),
        ({"video": torch.zeros(16, 3, 4, 6).to_sparse()}, "video is a tensor of torch.sparse_coo"),
        ({"prompt_ids": "x"}, "prompt_ids is a str"),
        ({"prompt_ids": torch.zeros(4, 512, 8)}, "prompt_ids has the shape"),
        ({"prompt_ids": [torch.zeros(512, 8)] * 2, "prompt_mask": [torch.ones(512)]}, r"2 texts .* but 1 masks"),
        ({"prompt_mask": {}}, "prompt_mask is a dict"),
        ({"prompt_mask": torch.arange(512) > 506}, "prompt_mask marks 5 of 512 tokens, not the first rows"),
        ({"prompt_mask": torch.ones(300)}, "marks 300 of 300 tokens, not the first rows of prompt_ids, which has 512"),
        ({"vace_context": torch.zeros(())}, "vace_context has the shape"),
        ({"text.0": torch.zeros(3, 8)}, "holds a tensor 'text.0', a name that has another meaning"),
        ({"text_mask": torch.zeros(3)}, "holds a tensor 'text_mask', a name that has another meaning"),
    ],
)
def test_other_contents_of_a_file_are_named(tmp_path, held, message):
    write(tmp_path, 2, count=1)
    prompt, mask = text(5, ())
    found = {"video": torch.zeros(1, 16, 3, 4, 6), "prompt_ids": prompt, "prompt_mask": mask}
    file = tmp_path / "features" / "video0_mp4.pt"
    torch.save(found, file)
    assert FeatureDataset(tmp_path).buckets == [(16, 3, 4, 6)]
    torch.save(found | held, file)
    with pytest.raises(ValueError, match=rf"video0_mp4\.pt.*{message}"):
        FeatureDataset(tmp_path)


def test_captions_that_do_not_say_where_they_end_are_told(tmp_path):
    write(tmp_path / "out", 2)
    file = tmp_path / "out" / "features" / "video1_mp4.pt"
    found = torch.load(file)
    del found["prompt_mask"]
    torch.save(found, file)
    with pytest.warns(UserWarning, match="1 of 4 files have no prompt_mask, e.g. features/video1_mp4.pt"):
        dataset = FeatureDataset(tmp_path / "out")
    assert [len(dataset[i]["text"][0]) for i in range(4)] == [5, 512, 7, 8]
