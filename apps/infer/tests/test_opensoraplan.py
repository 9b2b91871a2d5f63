"""Weights of Open-Sora-Plan: what is known of them, and what is refused, before a tensor is read."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from mm_convert import save_checkpoint
from mm_infer.config import Options
from mm_infer.inputs import Given
from mm_infer.settle import check, settle
from mm_infer.weights import Weights
from mm_models import build, preset
from mm_models.families import find
from mm_models.opensoraplan.testing import write_encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def write(tmp_path):
    """write(**what config.json says besides the number of heads; nothing: no config.json) -> a folder of weights."""
    torch.manual_seed(0)
    model = build("opensoraplan-tiny")

    def write(**said):
        save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
        heads = {"_class_name": "OpenSoraT2V", "num_attention_heads": 4, "attention_head_dim": 36}
        (tmp_path / "config.json").write_text(json.dumps(heads | said), encoding="utf-8")
        return tmp_path

    return write


SIZE = {"sample_size_t": 24, "sample_size": [60, 80]}
SCALE = {f"interpolation_scale_{axis}": 1.0 for axis in "thw"}


@pytest.mark.parametrize(
    ("said", "unsaid"), [({}, "interpolation_scale and sample_size"), (SCALE, "sample_size"), (SIZE, "interpolation_")]
)
def test_weights_that_do_not_say_their_size_need_a_preset(write, encoders, said, unsaid):
    """Those of 29 frames and of 93 have the same tensors, and make nothing but noise at each other's length."""
    with pytest.raises(ValueError, match=rf"no config\.json says {unsaid}.*opensoraplan-1\.2-29x480p"):
        Weights(write(**said), encoders)


def test_the_preset_is_believed_where_the_files_say_nothing(write, encoders):
    facts = Weights(write(), encoders, model="opensoraplan-tiny").facts
    assert facts.config == preset("opensoraplan-tiny")
    assert facts.published == find("opensoraplan-tiny")[1].published


def test_what_a_preset_contradicts_has_a_way_out(write, encoders):
    said = write(prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"v_prediction instead of epsilon; .* write .* sample_size into its config"):
        Weights(said, encoders, model="opensoraplan-tiny")
    anything = {"sample_size": None, "sample_size_t": None}
    facts = Weights(write(prediction_type="v_prediction", **SCALE, **anything), encoders).facts
    assert (facts.prediction, facts.published.trained_frames) == ("v_prediction", None)


@pytest.mark.parametrize(("frames", "length"), [(24, 93), (8, 29), (1, 1)])
def test_the_files_say_for_which_length_they_were_trained(write, encoders, frames, length):
    facts = Weights(write(**SCALE, **SIZE | {"sample_size_t": frames}), encoders).facts
    assert facts.config == replace(preset("opensoraplan-tiny"), sample_size=(frames, 60, 80))
    assert facts.prediction == "epsilon"
    settled = settle(Options(), Given(), facts)
    assert (settled.frames, settled.height, settled.width) == (length, 480, 640)
    with pytest.raises(ValueError, match=rf"frames 17: .* trained on videos of {length} frame\(s\) only, .* as noise"):
        check(Options(frames=17), Given(), facts)
    assert settle(Options(frames=17, other_frames=True), Given(), facts).frames == 17


def test_our_own_weights_of_any_size_say_so(encoders, tmp_path):
    tensors, config = build("opensoraplan-tiny").state_dict(), preset("opensoraplan-tiny")
    save_checkpoint(tmp_path / "ours", tensors, find("opensoraplan-tiny")[0].describe(config))
    facts = Weights(tmp_path / "ours", encoders).facts
    assert asdict(facts.config) == asdict(preset("opensoraplan-tiny"))
    assert facts.published.trained_frames is None


def test_encoders_of_another_width_are_refused(write, tmp_path):
    other = write_encoders(tmp_path / "encoders", text_dim=32)
    with pytest.raises(ValueError, match="text width 32 instead of 64"):
        Weights(write(**SCALE, **SIZE), other)


def test_a_vae_that_is_none_is_refused(write, tmp_path):
    other = write_encoders(tmp_path / "encoders")
    (other / "vae" / "checkpoint.ckpt").unlink()
    with pytest.raises(ValueError, match="should hold one set of weights"):
        Weights(write(**SCALE, **SIZE), other)
