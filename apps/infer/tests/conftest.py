"""A whole diffusers pipeline with random weights, small enough to run in a second and awake to its inputs."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """The directory; head dim 20, so that the three bands of rotary positions differ."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=20, ffn_dim=48, num_layers=3, text_dim=32, rope_max_seq_len=32
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1 or "scale_shift_table" in name:  # zeros and ones would hide a mix-up
                parameter += 0.2 * torch.randn_like(parameter)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    text = UMT5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    whole = WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer.eval(),
    )
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    whole.save_pretrained(path)
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and an end, so that every prompt has its own ids."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
