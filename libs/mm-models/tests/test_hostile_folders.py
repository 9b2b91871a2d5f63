"""Folders of encoders that are broken or ask for more: refused in one line, nothing is run, nothing is fetched."""

import json
import os
import pickle
import shutil
import socket
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_models.encoders import ImageEncoder, TextEncoder
from mm_models.folder import read_json
from mm_models.wan.tasks import fit, multiples
from mm_models.wan.testing import write_encoders
from mm_models.wan.vae import WanVAE

TEXT, CLIP = "model.safetensors", "model.safetensors"
VAE = "diffusion_pytorch_model.safetensors"
LOADERS = {"text_encoder": TextEncoder, "tokenizer": TextEncoder, "vae": WanVAE, "image_encoder": ImageEncoder}
DEEP = '{"a":' * 1000 + "1" + "}" * 1000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("whole"), image_dim=32)


@pytest.fixture
def repository(whole, tmp_path, monkeypatch):
    """A copy to be broken; whoever asks is told yes, and whoever calls is caught."""
    monkeypatch.setattr(sys, "stdin", StringIO("y\n" * 9))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def caught(*_: object) -> None:
        pytest.fail("something was to be fetched")

    for method in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, method, caught)
    monkeypatch.setattr(socket, "getaddrinfo", caught)
    (tmp_path / "outside").mkdir()
    return shutil.copytree(whole, tmp_path / "encoders")


def says(name: str = "config.json", **fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        said = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(said | fields))

    return change


def holds(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def lacks(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def no_numbers(folder: Path) -> None:
    tensors = load_file(folder / VAE)
    next(iter(tensors.values())).fill_(torch.inf)
    save_file(tensors, folder / VAE, {"format": "pt"})


def cut(name: str, at: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:at])


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def links_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = folder.parents[1] / "outside" / name
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def pickled(name: str, alone: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Code()))
        if alone:
            next(folder.glob("*.safetensors")).unlink()

    return change


def own_code(part: str) -> Callable[[Path], None]:
    """As a repository of the hub brings its own classes."""

    def change(folder: Path) -> None:
        (folder / "own.py").write_text("import os\nos.mkdir('code_was_run')\nclass Own: pass\n")
        if part == "tokenizer":
            says("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})(folder)
            says("tokenizer_config.json", tokenizer_class="Own")(folder)
        else:
            says(auto_map={"AutoModel": "own.Own", "AutoConfig": "own.Own"}, model_type="own")(folder)

    return change


def sharded(**entries: str) -> Callable[[Path], None]:
    """Weights in two files, with an index that is right but for `entries` (tensor=file, "" for none)."""

    def change(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors, stem = load_file(file), file.stem
        names = sorted(tensors)
        index = {}
        for i, part in enumerate((names[::2], names[1::2]), 1):
            save_file({name: tensors[name] for name in part}, folder / f"{stem}-{i}.safetensors", {"format": "pt"})
            index |= dict.fromkeys(part, f"{stem}-{i}.safetensors")
        index = {name: target for name, target in (index | entries).items() if target}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        file.unlink()

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def of_integers(folder: Path) -> None:
    tensors = load_file(folder / TEXT)
    save_file({k: v.to(torch.int8) for k, v in tensors.items()}, folder / TEXT, {"format": "pt"})


def vocabulary(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        said = json.loads((folder / "tokenizer.json").read_text())
        change(said)
        (folder / "tokenizer.json").write_text(json.dumps(said))

    return changed


CONFIGS = {  # of every part with weights
    "missing": (lacks("config.json"), r"config\.json does not exist"),
    "empty": (holds("config.json", ""), r"config\.json is not a JSON object"),
    "cut": (cut("config.json", 20), r"config\.json is not a JSON object"),
    "list": (holds("config.json", "[1]"), "is not a JSON object: it is a list"),
    "bytes": (holds("config.json", b'{"a": "\xff"}'), "is not a JSON object"),
    "deep": (holds("config.json", DEEP), "is nested more than 32 deep"),
    "large": (holds("config.json", '{"a": [' + "[]," * 500_000 + "[]]}"), r"has 1,500,\d+ bytes"),
    "pipe": (pipe("config.json"), "is no regular file"),
    "folder": (both(lacks("config.json"), lambda folder: (folder / "config.json").mkdir()), "is a folder, not a file"),
    "link": (links_out("config.json"), "is a link to .*outside its folder"),
    "auto_map": (says(auto_map={"AutoModel": "own.Own"}), "names code of its own"),
    "quantised": (says(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "is quantised"),
    "kernels": (says(attn_implementation="kernels-community/flash-attn"), "asks for other kernels"),
    "kernels, by another name": (says(_attn_implementation="org/repo:layer"), "asks for other kernels"),
    "other weights": (says(transformers_weights="../x.safetensors"), "names another file of weights"),
    "adapter": (says("adapter_config.json", base_model_name_or_path="org/base"), "holds an adapter"),
}
WEIGHTS = {
    "missing": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "has neither"),
    "empty": (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b""), "is no complete safetensors file"),
    "pickle beside": (pickled("pytorch_model.bin", alone=False), r"and also pytorch_model\.bin"),
    "pickle alone": (pickled("pytorch_model.bin", alone=True), r"pickled weights \(pytorch_model\.bin\)"),
    "pickle alone of diffusers": (pickled("diffusion_pytorch_model.bin", alone=True), "pickled weights"),
    "other file": (holds("old.safetensors", b""), r"and also old\.safetensors"),
    "gguf": (holds("model.gguf", b"GGUF"), r"and also model\.gguf"),
    "index of a pickle": (holds("pytorch_model.bin.index.json", "{}"), r"and also pytorch_model\.bin\.index\.json"),
    "index up": (sharded(**{"x.weight": "../outside.safetensors"}), "to '../outside.safetensors'"),
    "index at the root": (sharded(**{"x.weight": "/etc/passwd"}), "to '/etc/passwd'"),
    "index of a missing file": (sharded(**{"x.weight": "c.safetensors"}), r"has no c\.safetensors"),
    "index of a pickle's name": (sharded(**{"x.weight": "c.bin"}), r"to 'c\.bin'"),
    "index and whole file": (both(sharded(), holds(TEXT, b""), holds(VAE, b"")), "index.json, and also .*safetensors"),
}
OTHERS = {
    ("text_encoder", "cut"): (cut(TEXT, -10), "is no complete safetensors file"),
    ("text_encoder", "header of 2^63 bytes"): (holds(TEXT, b"\xff" * 7 + b"\x7f{}"), "is no complete safetensors file"),
    ("text_encoder", "header of no JSON"): (holds(TEXT, b"\x04" + b"\0" * 7 + b"[[[["), "is no complete safetensors"),
    ("text_encoder", "pipe"): (pipe(TEXT), "is no regular file"),
    ("text_encoder", "link"): (links_out(TEXT), "is a link to .*outside its folder"),
    ("text_encoder", "folder"): (both(lacks(TEXT), lambda folder: (folder / TEXT).mkdir()), "is a folder, not a file"),
    ("text_encoder", "folder beside"): (lambda folder: (folder / "x.model").mkdir(), "is a folder, not a file"),
    ("text_encoder", "index without"): (sharded(**{"shared.weight": ""}), "does not fit its files"),
    ("text_encoder", "index with more"): (sharded(**{"x.weight": "model-1.safetensors"}), "has no such tensor"),
    ("text_encoder", "index elsewhere"): (
        sharded(**{"shared.weight": "model-1.safetensors"}),
        "does not fit its files",
    ),
    ("text_encoder", "integers"): (of_integers, "it is quantised"),
    ("text_encoder", "code"): (own_code("text_encoder"), "names code of its own"),
    ("text_encoder", "layers"): (says(num_layers=10**9), "num_layers speaks of 1,000,000,000"),
    ("text_encoder", "more layers"): (says(num_layers=3), "missing keys"),
    ("text_encoder", "width"): (says(d_model=10**6), "describes .* parameters, but the weights hold"),
    ("text_encoder", "negative"): (says(d_ff=-1), "cannot be loaded as UMT5EncoderModel"),
    ("text_encoder", "word"): (says(d_kv="x"), "cannot be loaded as UMT5EncoderModel"),
    ("text_encoder", "vocabulary"): (says(vocab_size="x"), "vocab_size is 'x'"),
    ("text_encoder", "class"): (says(model_type="t5"), "model_type is 't5', and must be 'umt5'"),
    ("text_encoder", "no class"): (says(model_type=None), "model_type is None, and must be 'umt5'"),
    ("tokenizer", "missing"): (lacks("tokenizer.json"), "has neither tokenizer.json"),
    ("tokenizer", "empty"): (holds("tokenizer.json", ""), "is not a JSON object"),
    ("tokenizer", "cut"): (cut("tokenizer.json", -10), "is not a JSON object"),
    ("tokenizer", "list"): (holds("tokenizer.json", "[]"), "is not a JSON object: it is a list"),
    ("tokenizer", "other JSON"): (holds("tokenizer.json", "{}"), "cannot be loaded as a tokenizer"),
    ("tokenizer", "deep"): (holds("tokenizer.json", DEEP), "is nested more than 32 deep"),
    ("tokenizer", "pipe"): (pipe("tokenizer.json"), "is no regular file"),
    ("tokenizer", "folder"): (
        lambda folder: (folder / "more" / "added.json").mkdir(parents=True),
        "is a folder, not a",
    ),
    ("tokenizer", "pipe as template"): (pipe("chat_template.jinja"), "is no regular file"),
    ("tokenizer", "code"): (own_code("tokenizer"), "names code of its own"),
    ("tokenizer", "code of a model"): (says(auto_map={"AutoConfig": "own.Own"}), "names code of its own"),
    ("tokenizer", "config"): (holds("tokenizer_config.json", "[]"), "is not a JSON object"),
    ("tokenizer", "class"): (says("tokenizer_config.json", tokenizer_class=5), "cannot be loaded as a tokenizer"),
    ("tokenizer", "file"): (says("tokenizer_config.json", vocab_file="/etc/passwd"), "vocab_file names other files"),
    ("tokenizer", "versions"): (says("tokenizer_config.json", fast_tokenizer_files=["../x.json"]), "names other files"),
    ("tokenizer", "map"): (holds("special_tokens_map.json", "{"), "is not a JSON object"),
    ("tokenizer", "ids"): (vocabulary(lambda said: said["model"]["vocab"].update(x=9999)), "has a token 9999"),
    ("tokenizer", "end"): (vocabulary(lambda said: said.update(post_processor=None)), "with the mark of its end"),
    ("vae", "class"): (says(_class_name="AutoencoderKL"), "_class_name is 'AutoencoderKL', and must be"),
    ("vae", "class of a file"): (says(_class_name=["own", "Own"]), "_class_name is .*, and must be"),
    ("vae", "channels"): (says(z_dim=12), "mismatched|size|shape"),
    ("vae", "mean"): (says(latents_mean=[0.0]), "cannot be loaded as Wan's VAE"),
    ("vae", "deviation"): (says(latents_std=[0.0] * 16), "must be finite, the latter positive"),
    ("vae", "blocks"): (says(num_res_blocks=10**8), "num_res_blocks speaks of 100,000,000"),
    ("vae", "levels"): (says(dim_mult=[1] * 5000), "dim_mult speaks of 5,000"),
    ("vae", "number for a list"): (says(dim_mult=5), "cannot be loaded as AutoencoderKLWan"),
    ("vae", "factor"): (says(scale_factor_spatial=0), "scale_factor_spatial is 0, and must be a positive integer"),
    ("vae", "patches"): (says(patch_size="x"), "patch_size is 'x', and must be a positive integer"),
    ("vae", "no numbers"): (no_numbers, "1 tensors hold NaN or infinity, first"),
    ("vae", "cut"): (cut(VAE, 1000), "is no complete safetensors file"),
    ("image_encoder", "class"): (says(model_type="clip"), "model_type is 'clip', and must be 'clip_vision_model'"),
    ("image_encoder", "activation"): (says(hidden_act="own"), "cannot be loaded as CLIPVisionModel"),
    ("image_encoder", "heads"): (says(num_attention_heads=-1), "num_attention_heads is -1, and must not be negative"),
    ("image_encoder", "pixels"): (says(image_size=[1, 2]), "cannot be loaded as CLIPVisionModel"),
    ("image_encoder", "patches"): (says(patch_size=0), "cannot be loaded as CLIPVisionModel"),
}
CASES = {
    **{(part, what): case for part in ("text_encoder", "vae", "image_encoder") for what, case in CONFIGS.items()},
    **{(part, f"weights, {what}"): case for part in ("text_encoder", "vae") for what, case in WEIGHTS.items()},
    **OTHERS,
}


@pytest.mark.parametrize(("part", "what"), CASES, ids=lambda word: word)
def test_refused_in_one_line(repository, part, what, monkeypatch, tmp_path, capfd):
    change, reason = CASES[part, what]
    change(repository / part)
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(ValueError, match=reason) as refused:
        LOADERS[part](repository)
    assert time.monotonic() - began < 10
    assert str(repository / part) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "code_was_run").exists()
    assert capfd.readouterr() == ("", "")
    assert sys.stdin.read() == "y\n" * 9, "something asked"


def test_what_is_right_is_read(repository, tmp_path):
    text, clip, vae = TextEncoder(repository), ImageEncoder(repository), WanVAE(repository)
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0"
    for part in LOADERS:  # as the hub's cache has it
        (snapshot / part).mkdir(parents=True)
        for file in (repository / part).iterdir():
            file.rename(cache / "blobs" / f"{part}-{file.name}")
            (snapshot / part / file.name).symlink_to(Path("../../../blobs") / f"{part}-{file.name}")
    assert TextEncoder(snapshot).identity == text.identity
    assert ImageEncoder(snapshot).identity == clip.identity
    assert WanVAE(snapshot).identity == vae.identity
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "vae").symlink_to(snapshot / "vae")
    assert WanVAE(tmp_path / "linked").identity == vae.identity


def test_weights_in_several_files(whole, repository):
    sharded()(repository / "text_encoder")
    sharded()(repository / "vae")
    prompts = ["a cat"]
    assert torch.equal(TextEncoder(repository).encode(prompts)[0], TextEncoder(whole).encode(prompts)[0])
    video = torch.zeros(1, 3, 5, 16, 16)
    assert torch.equal(WanVAE(repository).encode(video), WanVAE(whole).encode(video))


def test_configurations_that_are_read_without_torch(repository):
    from mm_models.wan.config import WanConfig

    config = WanConfig(text_dim=32)
    fit(config, repository)
    says(d_model="x")(repository / "text_encoder")
    with pytest.raises(ValueError, match=r"text_encoder/config\.json: d_model is 'x'"):
        fit(config, repository)
    says(dim_mult=3)(repository / "vae")
    with pytest.raises(ValueError, match="must be short lists"):
        multiples(config, repository)
    pipe("model_index.json")(repository)
    with pytest.raises(ValueError, match="it is no regular file"):
        read_json(repository / "model_index.json")
    with pytest.raises(ValueError, match="it is no regular file"):
        read_json(repository)


def test_published_files_are_as_large_as_this(tmp_path):
    """UMT5's tokenizer.json has 17 MB; an index of a large model some MB."""
    words = {"model": {"vocab": [[f"word {i}", -i / 7] for i in range(60_000)]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    assert (tmp_path / "tokenizer.json").stat().st_size > 1 << 20
    assert read_json(tmp_path / "tokenizer.json") == words
    index = {"weight_map": {f"layers.{i}.weight": "model.safetensors" for i in range(30_000)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (tmp_path / "model.safetensors.index.json").stat().st_size > 1 << 20
    assert read_json(tmp_path / "model.safetensors.index.json") == index
