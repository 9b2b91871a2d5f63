"""Pairs of experts: three layouts, one meaning, and no half pairs."""

from __future__ import annotations

import json

import pytest

from mm_convert import open_experts, write_experts

OURS, DIFFUSERS = ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")


def folders(path, *names):
    for name in names:
        (path / name).mkdir(parents=True, exist_ok=True)
    return path


def test_three_layouts(tmp_path):
    published = folders(tmp_path / "published", *OURS)
    assert open_experts(published) == (published / OURS[0], published / OURS[1], None)

    assert write_experts(tmp_path / "ours", 0.875) == {
        "high": tmp_path / "ours" / OURS[0],
        "low": tmp_path / "ours" / OURS[1],
    }
    ours = folders(tmp_path / "ours", *OURS)
    assert json.loads((ours / "experts.json").read_text()) == {"format": "mm experts 1", "boundary": 0.875}
    assert open_experts(str(ours)) == (ours / OURS[0], ours / OURS[1], 0.875)
    with pytest.raises(ValueError, match=r"says boundary 0\.875, but it should be 0\.9"):
        write_experts(ours, 0.9)

    diffusers = folders(tmp_path / "diffusers", *DIFFUSERS)
    assert open_experts(diffusers).boundary is None
    (diffusers / "model_index.json").write_text('{"boundary_ratio": 0.9}')
    assert open_experts(diffusers) == (diffusers / "transformer", diffusers / "transformer_2", 0.9)

    assert open_experts(folders(tmp_path / "one", "transformer")) is None
    assert open_experts(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("transformer_2",), "transformer/, the one for high noise, is missing"),
        (OURS[:1], "low_noise_model/, the one for low noise, is missing.*alone, name .*high_noise_model$"),
        (OURS[1:], "high_noise_model/, the one for high noise, is missing"),
        ((*OURS, *DIFFUSERS), "high_noise_model/, low_noise_model/, transformer/, transformer_2/: which two"),
        ((*OURS, "transformer"), "which two are meant"),
    ],
)
def test_halves_and_mixtures_are_refused(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        open_experts(folders(tmp_path, *names))


def test_boundaries_that_cannot_be(tmp_path):
    folders(tmp_path, *OURS)
    for wrong in (0, 1.0, 875.0, True, "0.875", [0.9]):
        with pytest.raises(ValueError, match="must be a noise level between 0 and 1"):
            write_experts(tmp_path, wrong)
        assert not (tmp_path / "experts.json").exists()
        (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": wrong}))
        with pytest.raises(ValueError, match="must be a noise level between 0 and 1"):
            open_experts(tmp_path)
        (tmp_path / "model_index.json").unlink()
    write_experts(tmp_path, 0.875)
    (tmp_path / "model_index.json").write_text('{"boundary_ratio": 0.9}')
    with pytest.raises(ValueError, match=r"two boundaries, 0\.875 \(experts\.json\) and 0\.9 \(model_index\.json\)"):
        open_experts(tmp_path)
    for wrong in ('{"format": "mm experts 2"}', "[1]", "{"):
        (tmp_path / "experts.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"experts\.json"):
            open_experts(tmp_path)
