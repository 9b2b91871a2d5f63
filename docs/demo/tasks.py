"""What the demo runs for each task, in order: commands as a user types them.

{here} stands for this folder, {out} for the demo's, {repeats} for how much data is written.
"""

from dataclasses import dataclass

PAIRS_HELD_OUT = (
    "No training picture, clip or text shows or names any of these pairs of colour and shape: they were held out."
)
HELD_OUT = "No training clip shows any of these combinations of colour, shape and direction: they were held out."
DATA = " --data.features {out}/features --validation.features {out}/validation"


@dataclass(frozen=True)
class Demo:
    """One task. `runs` and `scores` name folders and files of its output."""

    title: str
    told: str  # above the generated clips, or the answers, in the report
    commands: dict[str, str]
    runs: tuple[str, ...] = ("run",)
    scores: tuple[str, ...] = ("scores",)


def extract(model: str, source: str, features: str, task: str = "") -> str:
    return (
        f"python -m mm_train.extract --model {model}{f' --task {task}' if task else ''} --encoders {{out}}/encoders"
        f" --config {{here}}/extract.toml --data.manifest {{out}}/clips/{source}.txt --output {{out}}/{features}"
    )


def train(
    model: str,
    flags: str = "",
    weights: str = "random",
    run: str = "run",
    data: str = DATA,
    samples: str = "",
    config: str = "train.toml",
) -> str:
    """`samples`: flags that say which sample videos are drawn meanwhile, where it is not the prompt of train.toml."""
    return (
        f"python -m mm_train --model {model} --weights {weights} --config {{here}}/{config}{flags}{data}"
        f"{samples} --sample.encoders {{out}}/encoders --output {{out}}/{run}"
    )


def generate(
    asked: str,
    weights: str,
    output: str,
    flags: str = "",
    lists: tuple[str, ...] = (),
    config: str = "generate.toml",
) -> str:
    """`lists`: the flags of mm_infer whose files stand beside the prompts."""
    files = "".join(f" --{name}_file {{out}}/clips/{asked}_{name}.txt" for name in lists)
    return (
        f"python -m mm_infer --weights {{out}}/{weights} --encoders {{out}}/encoders --config {{here}}/{config}"
        f"{flags} --prompt_file {{out}}/clips/{asked}.txt{files} --output {{out}}/{output}"
    )


def measure(asked: str, output: str, scores: str = "scores") -> str:
    return f"python {{here}}/measure.py {{out}}/{output} {{out}}/clips/{asked} --json {{out}}/{scores}.json"


CLIPS = "python {here}/clips.py {out}/clips --repeats {repeats}"
ENCODERS = "python {here}/text.py {out}/encoders"
CONVERT = "mm-convert WanConverter mm_to_hf --cfg.source_path {out}/run/weights-ema --cfg.target_path {out}/transformer"
NO_SAMPLES = " --sample.prompts '[]'"
FROM_VALIDATION = " --sample.prompts '[]' --sample.from_validation 1"

T2V = {
    "Write clips": CLIPS,
    "Assemble VAE and text encoder": ENCODERS,
    "Encode clips and captions": extract("wan-tiny", "data", "features"),
    "Encode the validation set": extract("wan-tiny", "validation", "validation"),
    "Train": train("wan-tiny"),
    "Convert to diffusers' format": CONVERT,
    "Generate what was held out": generate("held_out", "transformer", "generated"),
    "Measure": measure("held_out.txt", "generated"),
}


def from_images(model: str, task: str) -> dict[str, str]:
    """i2v has the image in channels and through CLIP; ti2v as a clean first latent frame."""
    chosen = f" --objective.task {task} --steps 600"
    return {
        "Write clips and first frames": "python {here}/images.py {out}/clips --repeats {repeats}",
        "Assemble VAE and encoders": ENCODERS + (" --image_encoder" if task == "i2v" else ""),
        "Encode clips, captions and first frames": extract(model, "data", "features", task),
        "Encode the validation set": extract(model, "validation", "validation", task),
        "Train": train(model, chosen, samples=FROM_VALIDATION),
        "Convert to diffusers' format": CONVERT,
        "Generate what was held out": generate("held_out", "transformer", "generated", f" --task {task}", ("image",)),
        "Measure": measure("held_out.json", "generated"),
    }


VACE = {
    "Write clips, sources, masks and references": "python {here}/edits.py {out}/clips --repeats {repeats}",
    "Assemble VAE and text encoder": ENCODERS,
    "Encode clips and captions for the base": extract("wan-tiny", "data", "base/features"),
    "Train the base, text to video": train(
        "wan-tiny", " --steps 400", run="base/run", data=" --data.features {out}/base/features", samples=NO_SAMPLES
    ),
    "Encode clips, captions and control": extract("wan-tiny-vace", "data", "features"),
    "Encode the validation set": extract("wan-tiny-vace", "validation", "validation"),
    "Train the control ladder": train(
        "wan-tiny-vace",
        " --trained '[\"vace_*\"]' --steps 700",
        weights="{out}/base/run/weights-ema",
        samples=FROM_VALIDATION,
    ),
    "Fill the masked half, as words say": generate("words", "run/weights-ema", "words", lists=("video", "mask")),
    "Fill it with what a reference shows": generate(
        "references", "run/weights-ema", "references", lists=("video", "mask", "references")
    ),
    "Measure what words gave": measure("words.json", "words", "words"),
    "Measure what references gave": measure("references.json", "references", "references"),
}


def expert(name: str) -> str:
    return train("wan-tiny-a14b", f" --expert {name} --steps 500", samples=NO_SAMPLES)


EXPERTS = {
    name: command for name, command in T2V.items() if not name.startswith(("Train", "Convert", "Gen", "Mea"))
} | {
    "Train the expert for high noise": expert("high"),
    "Train the expert for low noise": expert("low"),
    "Generate what was held out, with both": generate("held_out", "run/weights-ema", "generated"),
    "Measure": measure("held_out.txt", "generated"),
}

OPENSORAPLAN = {
    "Write clips": CLIPS,
    "Assemble VAE and text encoder": ENCODERS + " --opensoraplan",
    "Encode clips and captions": extract("opensoraplan-tiny", "data", "features"),
    "Encode the validation set": extract("opensoraplan-tiny", "validation", "validation"),
    "Train": train("opensoraplan-tiny", config="opensoraplan-train.toml"),
    "Convert to the released format": (
        "mm-convert OpenSoraPlanConverter mm_to_hf --cfg.source_path {out}/run/weights-ema"
        " --cfg.target_path {out}/transformer"
    ),
    "Generate what was held out": generate("held_out", "transformer", "generated", config="opensoraplan-generate.toml"),
    "Measure": measure("held_out.txt", "generated"),
}

QWEN = {
    "Write questions, pictures and clips": "python {here}/questions.py {out}/questions --repeats {repeats}",
    "Write a small model in the files of the hub": "python {here}/folder.py {out}/qwen {out}/questions/train.json",
    "Train": (
        "python -m mm_train --model qwen2.5-vl-tiny --weights {out}/qwen --config {here}/qwen-train.toml"
        " --data.conversations {out}/questions/train.json --validation.conversations {out}/questions/validation.json"
        " --output {out}/run"
    ),
    "Convert to the files of the hub": (
        "mm-convert Qwen2_5_VLConverter mm_to_hf --cfg.mm_dir {out}/run/weights --cfg.save_hf_dir {out}/answering"
        " --cfg.hf_config.hf_dir {out}/qwen --cfg.parallel_config.llm_pp_layers [4]"
        " --cfg.parallel_config.vit_pp_layers [3] --cfg.parallel_config.tp_size 1"
    ),
    "Ask about what was held out": (
        "python -m mm_infer.chat --weights {out}/answering --config {here}/qwen-chat.toml"
        " --questions {out}/questions/held_out.json --output {out}/answers.jsonl"
    ),
    "Measure": "python {here}/answers.py {out}/questions/held_out.json {out}/answers.jsonl --json {out}/scores.json",
}

DEMOS = {
    "t2v": Demo("A small Wan2.1, trained on this machine", HELD_OUT, T2V),
    "i2v": Demo(
        "Image to video: a small Wan2.1, trained on this machine",
        f"Each clip is made from an image and a prompt that says only the motion. {HELD_OUT}",
        from_images("wan-tiny-i2v", "i2v"),
    ),
    "ti2v": Demo(
        "Image to video with a clean first frame, as Wan2.2-5B does it: a small model, trained on this machine",
        f"Each clip is made from an image and a prompt that says only the motion. {HELD_OUT}",
        from_images("wan-tiny", "ti2v"),
    ),
    "vace": Demo(
        "VACE: a small control ladder, trained on this machine",
        "The source's grey half is to be filled, its other half to be kept. What belongs there is said by the prompt, "
        f"or shown by a reference beside a prompt that leaves the colour out. {HELD_OUT}",
        VACE,
        runs=("base/run", "run"),
        scores=("words", "references"),
    ),
    "experts": Demo(
        "Two experts, for high and for low noise, trained on this machine",
        HELD_OUT,
        EXPERTS,
        runs=("run/high", "run/low"),
    ),
    "opensoraplan": Demo("A small Open-Sora-Plan 1.2, trained on this machine", HELD_OUT, OPENSORAPLAN),
    "qwen": Demo(
        "Qwen2.5-VL: a small model that answers questions about pictures and clips, trained on this machine",
        f"The wanted boxes are green, those of the answers red. {PAIRS_HELD_OUT}",
        QWEN,
    ),
}
