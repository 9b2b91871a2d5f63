"""The demo's text encoder and tokenizer: tiny but real, in the files and folders of a diffusers repository.

    python docs/demo/text.py DIR [--image_encoder]
    python docs/demo/text.py DIR --opensoraplan

writes DIR/tokenizer (one token per word, T5's special tokens), DIR/text_encoder (a `UMT5EncoderModel` of random, seeded
weights), DIR/vae (a copy of docs/demo/codec), DIR/scheduler and DIR/model_index.json: a Wan2.1 repository without its
transformer. With --image_encoder also DIR/image_encoder, a `CLIPVisionModel` of random weights, for models that see an
image through CLIP.
With --opensoraplan: what Open-Sora-Plan 1.2 has beside its transformer, a tokenizer, an `MT5EncoderModel` and a causal
VAE (a copy of docs/demo/causal_codec).
Random weights will do: a sentence of nine words needs to be told from another, not to be understood.
So does a picture.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import TypeVar

import clips
import torch
from diffusers import UniPCMultistepScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    MT5EncoderModel,
    PreTrainedTokenizerFast,
    UMT5EncoderModel,
)

CODEC, CAUSAL_CODEC = (Path(__file__).parent / name for name in ("codec", "causal_codec"))
DIM = 64  # of an embedding; the `text_dim` of the model that is trained on them
IMAGE_DIM = 32  # of an image token; the `image_dim` of the model
T5 = TypeVar("T5", UMT5EncoderModel, MT5EncoderModel)
FLOW_SHIFT = 3.0  # of the sampler, when the repository is opened with diffusers


def tokenizer() -> PreTrainedTokenizerFast:
    """Splits at spaces; ids 0, 1, 2 are padding, end of sentence and unknown, as in UMT5. Sentences end in </s>."""
    words = ["<pad>", "</s>", "<unk>", "a", "moving", *clips.COLOURS, *clips.SHAPES, *clips.DIRECTIONS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **special)


def text_encoder(vocabulary: int, seed: int = 0, kind: type[T5] = UMT5EncoderModel) -> T5:
    """One layer, random. Its last norm gives every embedding unit variance, so no word is louder than another."""
    shape = {"d_model": DIM, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 1}
    torch.manual_seed(seed)
    return kind(kind.config_class(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **shape)).eval()


def image_encoder(seed: int = 0) -> CLIPVisionModel:
    """Random, of 257 tokens, as Wan's: 16 x 16 patches of 2 pixels, and one for the whole image.

    Wan takes what enters the last layer, so here one layer looks at the image.
    """
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=2 * IMAGE_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=2,
        hidden_act="gelu",
    )
    torch.manual_seed(seed)
    return CLIPVisionModel(config).eval()


def write(folder: Path, codec: Path = CODEC, with_image_encoder: bool = False) -> None:
    """Everything of the repository but the transformer, which is what the demo trains."""
    words = tokenizer()
    words.save_pretrained(folder / "tokenizer")
    text_encoder(len(words)).save_pretrained(folder / "text_encoder")
    if with_image_encoder:
        image_encoder().save_pretrained(folder / "image_encoder")
    shutil.copytree(codec, folder / "vae", dirs_exist_ok=True)
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)
    sampler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_opensoraplan(folder: Path, codec: Path = CAUSAL_CODEC) -> None:
    """The folders that an Open-Sora-Plan is trained and sampled with."""
    words = tokenizer()
    words.save_pretrained(folder / "tokenizer")
    text_encoder(len(words), kind=MT5EncoderModel).save_pretrained(folder / "text_encoder")
    shutil.copytree(codec, folder / "vae", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image_encoder", action="store_true", help="write image_encoder/, too")
    parser.add_argument("--opensoraplan", action="store_true", help="write what Open-Sora-Plan needs, not Wan")
    options = parser.parse_args()
    if options.opensoraplan:
        write_opensoraplan(options.folder)
    else:
        write(options.folder, with_image_encoder=options.image_encoder)


if __name__ == "__main__":
    main()
