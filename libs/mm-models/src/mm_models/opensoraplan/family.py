"""Open-Sora-Plan's record: what all others ask of version 1.2."""

from mm_models.family import Family, Video, later
from mm_models.opensoraplan import tasks
from mm_models.opensoraplan.config import OpenSoraPlanConfig
from mm_models.opensoraplan.presets import PRESETS
from mm_models.opensoraplan.vae_config import check_folder


def start():
    """What an Open-Sora-Plan begins with."""
    from mm_models.opensoraplan import start

    return start


OPENSORAPLAN = Family(
    name="opensoraplan",
    presets=PRESETS,
    config=OpenSoraPlanConfig,
    checkpoints=("opensoraplan",),
    tasks=tasks.tasks,
    describe=tasks.describe,
    build=later("mm_models.opensoraplan.model", "OpenSoraPlanModel"),
    plan=later("mm_models.opensoraplan.plan", "plan"),
    cost=later("mm_models.opensoraplan.cost", "Cost"),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    start=start,
    objective=later("mm_models.opensoraplan.encode", "objective"),
    objective_options={"snr_gamma": 5.0, "noise_offset": 0.02},
    example=later("mm_models.opensoraplan.example", "example"),
    video=Video(
        tasks_unasked=tasks.tasks_unasked,
        encoders=tasks.encoders,
        own_folders={"vae": check_folder},
        kinds={"text_encoder": "mt5"},
        multiples=tasks.multiples,
        fit=tasks.fit,
        prediction=lambda config: config.prediction_type,
        conditioning=later("mm_models.opensoraplan.encode", "Conditioning"),
        codec=later("mm_models.opensoraplan.vae", "OpenSoraPlanVAE"),
        tiling={"training": "training", "inference": "inference"},
        text_encoder=later("mm_models.opensoraplan.encode", "text_encoder"),
        sized=tasks.sized,
        note_shapes=tasks.note_shapes,
    ),
    unseen=("interpolation_scale", "sample_size"),
)
