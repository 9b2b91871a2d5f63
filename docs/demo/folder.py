"""The demo's model for questions: a tiny Qwen2.5-VL in the files of the hub, before it has learned anything.

    python docs/demo/folder.py DIR questions/train.json

writes a tokenizer that has learned its merges from these conversations, with the special tokens, the chat template and
the image processor of the released models; and random weights. transformers opens it like a folder from the hub.
"""

import argparse
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mm_models.qwen2_5_vl.presets import PRESETS
from mm_models.qwen2_5_vl.testing import write_hub_folder

USUAL = "You are a helpful assistant. system user assistant"
CONFIG = Path(__file__).parent / "qwen-train.toml"  # its architecture says how large the model is


def write(folder: Path, conversations: Path, seed: int = 0) -> None:
    entries = json.loads(conversations.read_text(encoding="utf-8"))
    texts = [message["content"] for entry in entries for message in entry["messages"]]
    texts += [USUAL] * len(texts)  # every conversation has them, with each of its turns
    sizes = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["architecture"]
    config = replace(PRESETS["qwen2.5-vl-tiny"].config, **sizes)
    config = replace(config, full_attention_layers=tuple(config.full_attention_layers))
    write_hub_folder(folder, config, seed, texts=texts)
    file, generator = str(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    weights = {name: begin(name, tensor, generator) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def begin(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A weight to begin with: matrices keep the size of a signal. The usual 0.02 suits wide models; narrow ones learn
    nothing from pictures for hundreds of steps.
    """
    if tensor.ndim == 1:
        return torch.zeros_like(tensor) if name.endswith("bias") else torch.ones_like(tensor)
    scale = 0.5 if "embed_tokens" in name else tensor[0].numel() ** -0.5
    return torch.randn(tensor.shape, generator=generator) * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("conversations", type=Path, help="what the tokenizer learns from, in the format of the guide")
    options = parser.parse_args()
    write(options.folder, options.conversations)


if __name__ == "__main__":
    main()
