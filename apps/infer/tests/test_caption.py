"""Captions beside clips and pictures: what the model answers, written whole, and never over one that is there."""

import numpy as np
import pytest
from PIL import Image

from mm_convert.cli.terminal import one_line
from mm_data.folders import read_folder
from mm_data.video_write import write_video
from mm_infer import chat
from mm_infer.caption import main
from mm_models.qwen2_5_vl.testing import tiny_config, write_hub_folder

FLAGS = ["--chat.image_max_pixels=9000", "--chat.video_min_pixels=784", "--chat.video_max_pixels=5000"]
FLAGS += ["--max_new_tokens=6", "--device=cpu", "--prompt=say what this {} shows"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub_folder(tmp_path_factory.mktemp("hub"), tiny_config(merges=110), seed=3)


@pytest.fixture
def folder(tmp_path):
    """a.png, more/v.mp4, kept.jpg with a caption."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    picture.save(folder / "a.png")
    picture.save(folder / "kept.jpg")
    (folder / "kept.txt").write_text("a caption by hand")
    frames = (np.arange(9)[:, None, None, None] * 20 + np.zeros((9, 56, 84, 3))).astype(np.uint8)
    write_video(folder / "more/v.mp4", frames, fps=4)
    return folder


def caption(*argv: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in argv] + FLAGS)
    return end.value.code


def test_what_has_no_caption_gets_what_chat_answers(hub, folder, capsys):
    assert caption(folder, "--weights", hub, "--prefix", "sks, ") == 0
    out, err = capsys.readouterr()
    assert "2 of 3 get a caption, 1 have one" in err
    assert [line.split(": ")[0] for line in out.splitlines()] == ["1/2 a.png", "2/2 more/v.mp4"]
    found = {one.name: one.caption for one in read_folder(folder, print)}
    assert found["kept.jpg"] == "a caption by hand"
    for name, kind in (("a.png", "image"), ("more/v.mp4", "video")):
        asked = f"--prompt=say what this {kind} shows"
        chat.main(["--weights", str(hub), f"--{kind}", str(folder / name), *FLAGS[:-1], asked])
        answer = " ".join(capsys.readouterr().out.split())
        assert answer
        assert f"{name}: sks, {answer}" in out
        assert one_line(found[name]) == f"sks, {answer}"

    assert caption(folder, "--weights", hub) == 0  # again: nothing is left to do, and no weights are read
    assert "0 of 3 get a caption" in capsys.readouterr().err


def test_ranks_share_the_files(hub, folder, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert caption(folder, "--weights", hub) == 0
    assert not (folder / "a.txt").exists()
    assert (folder / "more/v.txt").exists()


def test_what_cannot_be_captioned_is_named(hub, folder, capsys):
    (folder / "more/v.mp4").write_bytes(b"no video")
    assert caption(folder, "--weights", hub) == 1
    err = capsys.readouterr().err
    assert "more/v.mp4: no caption" in err
    assert "1 of 2 got no caption" in err
    assert (folder / "a.txt").exists()
    assert not (folder / "more/v.txt").exists()


def test_a_prompt_with_marks_or_without_words_is_refused(hub, folder, capsys):
    for prompt, way in (("<image> what is it?", "leave the mark out, or write {}"), ("", "--prompt is empty: write")):
        with pytest.raises(SystemExit, match="2"):
            main([str(folder), "--weights", str(hub), "--prompt", prompt])
        assert way in capsys.readouterr().err
    assert not (folder / "a.txt").exists()


def test_a_folder_that_is_none_is_refused(hub, folder, capsys):
    assert caption(folder / "a.png", "--weights", hub) == 2
    assert "is not a folder" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert caption(folder / "empty", "--weights", hub) == 2
    assert "holds no clip and no picture" in capsys.readouterr().err
