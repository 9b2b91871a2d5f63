"""mm_infer is killed before every change that it makes to the file system, and the same command runs again."""

from pathlib import Path

import pytest

from mm_convert import lock_output
from mm_convert.testing.kills import Scenario, kill_everywhere
from mm_infer.__main__ import main

PACKAGES = ["mm_infer", "mm_models", "mm_convert", "torch", "diffusers", "transformers", "accelerate"]
SMALL = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "1", "--guidance", "1"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_before_any_change_and_given_again_all_videos_are_there(pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("一只猫\na dog\n", encoding="utf-8")
    argv = ["--weights", str(pipeline), "--prompt_file", str(tmp_path / "prompts.txt"), *SMALL, "--output"]
    (tmp_path / "empty").mkdir()
    main([*argv, str(tmp_path / "done")])
    scenario = Scenario("mm_infer.__main__:main", [*argv, "out"], str(tmp_path / "empty"))
    (kills,) = kill_everywhere([scenario], tmp_path / "work", PACKAGES)
    assert len(kills.kills) > 6
    whole = tree(tmp_path / "done")
    for kill in kills.kills:
        at = f"killed before {kill.change}"
        seen = {name: data for name, data in tree(kill.killed).items() if not Path(name).name.startswith(".")}
        assert seen.items() <= {f"out/{name}": data for name, data in whole.items()}.items(), at
        assert kill.code == 0, f"{at}\n{kill.said}"
        assert tree(kill.again / "out") == whole, at


def test_a_second_run_in_one_output_is_refused(pipeline, tmp_path, capsys):
    argv = ["--weights", str(pipeline), "--prompt", "a cat", *SMALL, "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.tmp-1.mp4").touch()
    with lock_output(tmp_path / "out"):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        assert (tmp_path / "out/.tmp-1.mp4").exists()  # a living process may be writing it
    assert f"{tmp_path}/out is being written by process " in capsys.readouterr().err
    main(argv)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"video_0.mp4"}
