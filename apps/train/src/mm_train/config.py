"""What a training run is told; `mm_train.checks` says what of it cannot work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from mm_data import Geometry
from mm_data.chat_options import ChatOptions
from mm_models.diffusion.samplers import SamplerName
from mm_models.family import AskedTiling
from mm_parallel import MemoryConfig, ParallelConfig
from mm_parallel.config import AttentionName


@dataclass(frozen=True)
class LayoutConfig(ParallelConfig):
    """How the ranks are laid out: pp x dp_replicate x dp_shard x ring x ulysses x tp, neighbours in the last."""

    exact: bool = False
    """For verification, with Ulysses alone: every sum in one fixed order, so that losses and weights are the same bits
    for cp 1, 2 and 4. Slow.
    """

    def resolve(self, world: int) -> LayoutConfig:
        """See `ParallelConfig`; also refuses what cannot be verified."""
        if self.exact:
            from mm_parallel import verify  # with torch, which a command line is read without

            verify.check_layout(replace(self, exact=False), world)
        return super().resolve(world)


Listed = tuple[str, ...] | str
"""Files: a list of them, or text with commas between them. `a.json=0.5` shows half of that one in an epoch."""


@dataclass
class VideoData:
    """Of models that make videos: features, or videos that are encoded as they are needed."""

    features: Path | None = None
    """For videos: directory written by mm_train.extract, or a MindSpeed-MM feature folder; or a TOML of sets of them,
    each with repeats or a weight.
    """
    manifest: Path | None = None
    """In place of features: a folder of clips and pictures with a .txt beside each; data.txt, data.json or .jsonl in
    the format of MindSpeed-MM, or a folder with annotation.json in it or in its folders; or a TOML of sets of these,
    with repeats, weights, sizes.
    """
    caption: str | None = None
    """For a manifest: what stands for the caption of a sample that has none; empty text is the empty prompt."""
    encoders: Path | None = None
    """For a manifest: diffusers directory with vae/, text_encoder/, tokenizer/ (and image_encoder/ with CLIP)."""
    geometry: Geometry = field(default_factory=Geometry)
    encode_every: Annotated[int, ">= 0", "<= 1048576"] = 8
    """For a manifest: so many steps are encoded at a time; then the encoders go back to the host, until the next. 0
    leaves them on the device.
    """
    share_encoding: bool = True
    """For a manifest: ranks that work on the same samples encode a part of them each."""
    tiling: AskedTiling = None
    """For a manifest: let the VAE work in tiles, with less memory and slightly other numbers at the seams. By default
    as the makers did: Wan whole, Open-Sora-Plan in tiles of training; true takes these, inference those of sampling.
    """
    micro_batch: Annotated[int, ">= 1", "<= 1048576"] = 1
    """For videos: samples per forward on one rank; the rest of the global batch is accumulated."""
    text_dropout: Annotated[float, ">= 0", "< 1"] = 0.0
    """For videos: probability of training a sample on the empty prompt (needed for guidance; 0.1 is usual)."""


@dataclass
class ConversationData:
    """Of models that read conversations: files of them, encoded and packed as they are needed."""

    conversations: Listed = ()
    """For conversations: JSON or JSONL, in any format that people have, or MindSpeed-MM's data_3b.json. Several are a
    list, or a,b.jsonl; a.json=0.5 shows half of it in an epoch, =2 all of it twice.
    """
    media: Path | None = None
    """For conversations: the folder from which the paths of images and videos begin; by default that of each file."""
    boxes: Literal["text", "original"] = "text"
    """For conversations: original: "bbox_2d" and "point_2d" in answers are pixels of the image as it is, and are scaled
    with it; text: they are left as they are.
    """
    processor: Path | None = None
    """For conversations: the hub's folder with tokenizer and preprocessor_config.json; by default --weights."""
    max_tokens: Annotated[int, ">= 16", "<= 16777216"] = 4096
    """For conversations: the most tokens, of text and images, of one, and of a forward on one rank."""
    max_patches: Annotated[int, ">= 1", "<= 67108864"] | None = None
    """For conversations: the most image patches, of one, and of a forward; by default 4 for each of max_tokens."""
    too_long: Literal["drop", "refuse", "drop_turns", "shrink"] = "drop"
    """For conversations: what becomes of one with more than max_tokens or max_patches. drop: it is left out, counted
    and named; refuse: an error; drop_turns: its oldest turns go; shrink: its images become smaller.
    """
    packing: bool = True
    """For conversations: forwards hold as many as fit; false: one each. Losses are the same."""
    survey: bool = True
    """For conversations: look for all files, and into their headers, before training; false: as they come."""
    decode_timeout: Annotated[float, "> 0", "<= 604800"] = 120
    """For conversations: seconds that images and videos of one may take to be decoded; then the run ends, naming them.
    """
    chat: ChatOptions = field(default_factory=ChatOptions)

    @property
    def most_patches(self) -> int:
        """`max_patches`, or what is usual."""
        return self.max_patches or 4 * self.max_tokens


@dataclass
class DataConfig(ConversationData, VideoData):
    """What is trained on, in what portions. Videos: features, or a manifest of videos that are encoded as they are
    needed. Conversations: files of them.
    """

    global_batch: Annotated[int, ">= 1", "<= 1048576"] = 8
    """Samples per optimizer step, over all ranks. Part of the sample stream: a resume keeps it."""
    small_buckets: Literal["repeat", "drop"] = "repeat"
    """Shapes with fewer samples than a global batch: repeat their samples within a step, or leave these shapes out.
    Part of the sample stream: a resume keeps it.
    """
    workers: Annotated[int, ">= 0", "<= 256"] = 2
    """Loader threads per rank."""


@dataclass
class ObjectiveConfig:
    """What the model learns to do, and how. An option that is not given is what the model's family trains with."""

    task: str = "auto"
    """What the model learns to do; auto: what it was made for. Of Wan: t2v, i2v, flf2v, ti2v or vace (t2v for
    wan2.2-ti2v-5b, which also learns ti2v).
    """
    boundary: Annotated[float, "> 0", "< 1"] | None = None
    """Noise level (sigma) at which the parts of two experts meet; by default that at which their model was published to
    switch.
    """
    shift: Annotated[float, "> 0"] | None = None
    """Of flow matching: timestep shift of the training schedule, independent of the shift used for sampling; 5 for Wan,
    as in MindSpeed-MM.
    """
    range: tuple[Annotated[float, ">= 0", "<= 1"], Annotated[float, ">= 0", "<= 1"]] | None = None
    """Of flow matching: part of the schedule that is trained, as fractions of its 1000 points from noise to data. By
    default all of it, or the part of the expert that is trained.
    """
    weighting: Literal["bsmntw", "none"] | None = None
    """Of flow matching: loss weight per timestep. bsmntw is a bell around t=500 (DiffSynth, MindSpeed-MM; the default
    for Wan), none weighs all alike.
    """
    sampling: Literal["uniform", "logit_normal"] | None = None
    """Of flow matching: how timesteps are drawn, before the shift. uniform (the default for Wan); logit_normal:
    sigmoid(mean + std z), more of the middle.
    """
    logit_mean: Annotated[float, ">= -20", "<= 20"] | None = None
    """Of logit_normal; 0 by default. Above 0 is more noise."""
    logit_std: Annotated[float, "> 0"] | None = None
    """Of logit_normal; 1 by default. What others call the scale of the sigmoid."""
    shift_by: Literal["fixed", "sqrt", "flux"] | None = None
    """Of flow matching: whether the shift depends on a clip's size. fixed: no (the default); sqrt: shift is that of
    shift_tokens, and grows with the root of the tokens (Stable Diffusion 3); flux: as FLUX.1, for images.
    """
    shift_tokens: Annotated[int, ">= 1"] | None = None
    """Of shift_by sqrt: tokens of a clip that has the shift as it is given; Wan has 32,760 for 81 frames of 480x832."""
    snr_gamma: Annotated[float, ">= 0"] | None = None
    """Of DDPM: the error at a timestep weighs min(snr, gamma) / snr, or / (snr + 1) with v-prediction, so that those
    with little noise do not outweigh the others (min-SNR); 5 is usual. 0 weighs all alike.
    """
    average: Literal["token", "micro_batch", "sample"] | None = None
    """Of conversations: what counts alike in a step. token: every token that is trained, over all ranks (the default);
    micro_batch: every conversation, as MindSpeed-MM with one in a micro-batch; sample: every one that has such tokens.
    """
    noise_offset: Annotated[float, ">= 0"] | None = None
    """Of DDPM: so much noise more that is the same in all of a channel, and is drawn for each sample and channel. A
    model that has seen it makes videos that are darker and brighter as a whole; 0.02 is usual.
    """


OptimizerName = Literal["adamw", "muon", "adafactor", "adamw8bit", "prodigy", "schedulefree"]


@dataclass
class OptimConfig:
    """How weights are updated. Biases and one-dimensional parameters are not decayed."""

    name: OptimizerName = "adamw"
    """muon: orthogonal updates for the matrices of layers, AdamW for all else; adafactor: second moments by rows and
    columns; adamw8bit: moments of 8 bits; prodigy finds its rate (give lr 1); schedulefree: an average in place of a
    schedule. The last two are packages: pip install prodigyopt, schedulefree.
    """
    lr: Annotated[float, ">= 0", "<= 1"] = 1e-5
    min_lr: Annotated[float, ">= 0", "<= 1"] = 0.0
    """Where the cosine and linear schedules end; not above lr."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Annotated[int, ">= 0"] = 0
    """Steps over which the learning rate rises linearly from 0."""
    rates: dict[str, Annotated[float, ">= 0", "<= 1"]] = field(default_factory=dict)
    """Learning rates in place of lr for some of what is trained: a part of the model, its last layers, or a pattern of
    names, as for --trained, e.g. '{"vision": 2e-6}'. Of several that name a parameter the last counts. Warmup and
    schedule are the same for all, and min_lr stands to each as to lr.
    """
    weight_decay: Annotated[float, ">= 0"] = 0.01
    betas: tuple[Annotated[float, ">= 0", "< 1"], Annotated[float, ">= 0", "< 1"]] = (0.9, 0.999)
    eps: Annotated[float, "> 0"] = 1e-8
    momentum: Annotated[float, ">= 0", "< 1"] = 0.95
    """Of muon."""
    clip: Annotated[float, ">= 0"] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    kernel: Literal["fused", "foreach"] = "fused"
    """How AdamW is computed: fused reads and writes every number once; foreach makes lists of tensors for each of its
    dozen operations. The formula is one, they differ by rounding.
    """
    ema: Annotated[float, ">= 0", "< 1"] = 0.0
    """Decay of the moving average of the weights; 0 keeps none."""


@dataclass
class LoRAOptions:
    """Low-rank adapters instead of full training, when rank is above 0."""

    rank: Annotated[int, ">= 0", "<= 65536"] = 0
    alpha: Annotated[float, "> 0"] = 16.0
    dropout: Annotated[float, ">= 0", "< 1"] = 0.0
    targets: tuple[str, ...] | None = None
    """Names of the linears that get an adapter (matched as peft does, by suffix), also in one part of the model
    alone (vision:qkv), or a part, which means all in it; by default those of all attentions and feed-forwards.
    """
    weights: Path | None = None
    """An adapter to go on from, in any format that mm-convert reads; by default they are fresh. Rank, alpha and targets
    must be its own.
    """


@dataclass
class CheckpointConfig:
    every: Annotated[int, ">= 1"] = 500
    """Steps between checkpoints; one more is written at the end."""
    keep: Annotated[int, ">= 0"] = 3
    """How many of the newest are kept; 0 keeps all."""
    resume: Literal["auto", "never", "changed"] = "auto"
    """auto continues the run found in the output directory; never refuses a directory that holds one; changed continues
    it also where features, or frozen weights, hold something else than when it was saved.
    """


@dataclass
class VideoValidation:
    features: Path | None = None
    """For videos: features of the validation set; none, no validation."""
    timesteps: tuple[Annotated[int, "> 0", "< 1000"], ...] = ()
    """For videos: t in 0..1000 at which every sample is measured, each with its own fixed noise; by default the middles
    of five equal parts of what is trained (100, 300, 500, 700, 900 where that is everything).
    """


@dataclass
class ConversationValidation:
    conversations: Listed = ()
    """For conversations: files of the validation set, as for --data.conversations; none, no validation."""
    answers: Annotated[int, ">= 0"] = 0
    """For conversations: of so many of them, the last answer is also given by the model, token by token, and compared
    with the one that is there. Each token of all of them is a forward.
    """


@dataclass
class ValidationConfig(ConversationValidation, VideoValidation):
    """A loss on samples that are not trained, and for conversations how many answers are right to the letter."""

    every: Annotated[int, ">= 1"] = 500
    max_samples: Annotated[int, ">= 1"] = 64


@dataclass
class VideoSamples:
    """Of videos. What is not given is as the model was published with, as in mm_infer."""

    prompts: tuple[str, ...] = ()
    """For videos: texts to make them from."""
    encoders: Path | None = None
    """For videos: diffusers directory with vae/, text_encoder/ and tokenizer/."""
    height: Annotated[int, ">= 1"] | None = None
    width: Annotated[int, ">= 1"] | None = None
    frames: Annotated[int, ">= 1"] | None = None
    steps: Annotated[int, ">= 1", "<= 1000"] | None = None
    guidance: Annotated[float, ">= 1"] | None = None
    """Weight of the prompt against the negative one; 1 leaves that out."""
    negative_prompt: str | None = None
    """What to stay away from."""
    prompt_template: str | None = None
    """What is put around each of the prompts, where {} stands; captions of the validation set stay as they are."""
    sampler: SamplerName | None = None
    """Flow matching: unipc, euler; models that predict noise or v: euler_ancestral, pndm, ddim, ddpm."""
    flow_shift: Annotated[float, "> 0"] | None = None
    """Of flow matching: bends the steps towards noise."""
    lora: Path | None = None
    """For videos: an adapter that acts on what is trained while samples are made, and at no other time, as one that was
    distilled to four steps. Where its name is known, steps, guidance, flow_shift and sampler are those of its authors.
    """
    lora_strength: Annotated[float, "!= 0"] = 1.0
    """How strongly; 1 is as it was trained."""
    seed: Annotated[int, ">= 0", "<= 9223372036854775807"] = 0
    """Of all noise; the same at every step, so that videos compare."""
    fps: Annotated[float, "> 0", "<= 240"] | None = None
    """Frames per second of the mp4."""


@dataclass
class AnswerSamples:
    max_new_tokens: Annotated[int, ">= 1", "<= 65536"] = 128
    """For conversations: the most tokens of an answer, here and in validation."""


@dataclass
class SampleConfig(AnswerSamples, VideoSamples):
    """What the model makes meanwhile. Videos: drawn by the function that mm_infer uses; what is not given is as the
    model was published with. Conversations: answers to questions of the validation set, beside those that are there.
    """

    from_validation: Annotated[int, ">= 0"] = 0
    """How many samples of the validation set are made again: videos from their captions and conditions (images,
    control), the last answers of conversations from all that stands before them.
    """
    every: Annotated[int, ">= 1"] = 500


@dataclass
class LogConfig:
    """Where numbers go besides metrics.jsonl and TensorBoard files."""

    wandb: str = ""
    """Weights & Biases: a project, or entity/project (pip install wandb). WANDB_MODE=offline writes without network."""
    wandb_name: str = ""
    """The run's name there; by default that of the output directory."""


@dataclass
class Config:
    """Train a model of videos, on extracted features or straight from videos; or a model that answers, on conversations
    with images and videos.
    """

    model: str
    """Preset, as wan2.1-t2v-1.3b; the README has a table of them."""
    weights: str = ""
    """Where to start: a diffusers directory, the makers' original files, or a checkpoint of ours; the word `random` for
    a fresh model.
    """
    output: Path = Path("run")
    """Directory for metrics.jsonl, TensorBoard files, checkpoints, samples and the final weights."""
    recipe: str = ""
    """File of defaults to start from; empty takes the one named like the model, if there is one."""
    expert: Literal["high", "low", "both"] | None = None
    """Of a model that is two experts, which one is trained. Both go into the same --output, one after the other; or in
    one run that takes turns, and the other waits on the host.
    """
    expert_steps: Annotated[int, ">= 1"] = 10
    """Of --expert both: steps of one turn. More of them move weights between host and device less often."""
    trained: tuple[str, ...] = ("*",)
    """What is trained; the others stay as they are. Patterns of the names of parameters, e.g. ["vace_*"]; where a
    model's family has parts, also these, and their last layers: ["merger", "language:-4"].
    """
    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of the preset to replace, e.g. --architecture '{"num_layers": 4}'."""
    steps: Annotated[int, ">= 1"] = 5000
    """Optimizer steps of the whole run."""
    seed: Annotated[int, ">= 0", "<= 9223372036854775807"] = 42
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the matrix multiplications; master weights, moments, norms and modulation stay float32."""
    attention: AttentionName = "auto"
    """The kernel of attention between tokens, where there are several: on CUDA flash, cudnn (H100, B200), flash3 or
    flash4 (with their packages), efficient. auto takes one by device, dtype and shapes. The first lines of a run
    name it.
    """
    compile: bool = False
    """Compile each layer (torch.compile): fewer and larger kernels. The first step, and the first of another shape,
    take much longer.
    """
    deadline: Annotated[float, ">= 10", "<= 604800"] = 600
    """Seconds that a step may take, up to a week; then the run ends and says which rank hangs, and where."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a non-finite loss or gradient does."""
    log_tps: bool = False
    """For conversations: say at the end how many tokens a second were trained, in MindSpeed-MM's way of counting (its
    --log-tps), to compare with its tables.
    """
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    parallel: LayoutConfig = field(default_factory=LayoutConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def trainees(self) -> list[Config]:
        """One configuration for each model that the run trains."""
        return [replace(self, expert=one) for one in ("high", "low")] if self.expert == "both" else [self]

    @property
    def patience(self) -> float:
        """Seconds that a part of the preparation may take: weights and lists of videos may be long to read."""
        return max(3600, 10 * self.deadline)

    @property
    def run_dir(self) -> Path:
        """Where this run keeps what is its own: the output directory, or the expert's folder in it."""
        return self.output / self.expert if self.expert else self.output

    @property
    def artifact(self) -> Path:
        """What comes out in the end: weights or an adapter, of one model or of two experts."""
        return self.output / ("adapter" if self.lora.rank else "weights")

    @property
    def has_frozen(self) -> bool:
        """Whether a run trains only a part of its model, so that its checkpoints hold only that."""
        return bool(self.lora.rank) or self.trained != ("*",)

    def micro_batches(self, data_ranks: int) -> int:
        """Forwards per optimizer step on each of `data_ranks` ranks."""
        share = data_ranks * self.data.micro_batch
        if self.data.global_batch % share:
            down = self.data.global_batch // share * share
            legal = [n for n in (down, down + share) if n]
            raise ValueError(
                f"--data.global_batch {self.data.global_batch} cannot be cut into micro-batches of "
                f"{self.data.micro_batch} on {data_ranks} data-parallel ranks: it must be a multiple of {share}; give "
                f"--data.global_batch {' or '.join(map(str, legal))}"
            )
        return self.data.global_batch // share
