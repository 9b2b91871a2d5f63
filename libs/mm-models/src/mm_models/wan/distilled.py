"""Distilled weights and adapters of Wan that are known by the names of their files: facts that their authors publish.

Only what is sure has a row. All of lightx2v's step through noise levels 1, 0.75, 0.5, 0.25 before the shift, without
adding noise (`WanStepDistillScheduler`), which is `euler` on the usual grid; with two experts, two steps are of each.
Others are left out, as their authors leave a choice or sample otherwise: FastWan (DMD) adds fresh noise at every step,
CausVid was extracted by others, AccVid and FusionX name ranges. Their settings are given by flags.
"""

from mm_models.family import Distilled

_FOUR_STEPS = {"steps": 4, "guidance": 1.0, "flow_shift": 5.0, "sampler": "euler"}

DISTILLED = (
    # wan2.1_t2v_14b_lora_rank64_lightx2v_4step, wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022, …
    Distilled(
        "lightx2v's distilled models and LoRAs of 4 steps",
        r"(lightx2v_4step(?!s)|wan2\.[12]-distill-(loras|models))",
        **_FOUR_STEPS,
        source="LightX2V, configs/distill/wan21 and wan22",
    ),
    # Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64; the folder Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v
    Distilled(
        "lightx2v's StepDistill-CfgDistill",
        r"(lightx2v_cfg_step_distill|stepdistill-cfgdistill)",
        **_FOUR_STEPS,
        source="LightX2V, configs/distill/wan_t2v_distill_4step_cfg_lora.json",
    ),
    # The folder Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1, or as Comfy-Org renamed its files:
    # wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise
    Distilled(
        "Wan2.2-Lightning",
        r"(4steps-lora-rank\d+-seko|4steps_lora_rank\d+_seko|lightx2v_4steps_lora|wan2\.2-lightning)",
        **_FOUR_STEPS,
        source="ModelTC/Wan2.2-Lightning",
    ),
)
