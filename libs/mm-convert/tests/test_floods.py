"""What would be waited for, or would fill the memory: every read ends soon, with one line that says why."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm_convert import convert, open_checkpoint, open_experts, open_file, open_lora, read_json, read_text, read_toml
from mm_convert.cli import main
from mm_convert.files import MAX_DEPTH, parse_json
from mm_convert.lora.names import FILES
from mm_convert.lora.strength import _read_patterns
from mm_convert.store.dcp import Index
from mm_convert.store.records import RecordWriter
from mm_convert.store.safetensors import read_file
from mm_convert.store.torch_file import read_torch_file
from mm_convert.store.unpickle import unpickle


@contextmanager
def within(seconds, mebibytes=500):
    """Raises TimeoutError, or MemoryError, for what takes longer, or more."""

    def end(*_):
        raise TimeoutError(f"this takes more than {seconds} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- what is no regular file


def make_pipe(path):
    os.mkfifo(path)


def make_link_to_device(path):
    path.symlink_to("/dev/zero")


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


IRREGULAR = {"named pipe": make_pipe, "device": make_link_to_device, "socket": make_socket}


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("read", [open_file, read_text, read_json, read_toml, open_checkpoint, open_lora, read_file])
def test_only_regular_files_are_opened(read, kind, tmp_path):
    path = tmp_path / "weights.safetensors"
    IRREGULAR[kind](path)
    with within(2), pytest.raises(ValueError, match=f"weights.safetensors is a {kind}"):
        read(path)


def test_a_directory_is_no_file(tmp_path):
    for read in (open_file, read_json, read_toml, read_file):
        with pytest.raises(ValueError, match="is a directory, not a regular file"):
            read(tmp_path)


def test_one_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    regular, path = tmp_path / "regular", tmp_path / "file.json"
    regular.touch()
    os.mkfifo(path)
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda what, **more: stat(regular if what == path else what, **more))  # the moment
    with within(2), pytest.raises(ValueError, match="named pipe"):
        open_file(path)


def checkpoints(toys, folder):
    """One of each layout: what opens it, and where it lies."""
    source = toys.diffusers(folder / "diffusers", files=2)
    torch_file = convert(source, folder / "torch.pt", "original")
    yield open_checkpoint, source
    yield open_checkpoint, folder / "torch.pt"
    for form in ("mm", "mindspeed"):
        convert(torch_file.path, folder / form, form)
        yield open_checkpoint, folder / form
    toys.diffusers(folder / "pair/transformer")
    toys.diffusers(folder / "pair/transformer_2")
    (folder / "pair/model_index.json").write_text('{"boundary_ratio": 0.875}')
    yield open_experts, folder / "pair/model_index.json"
    adapter = folder / "adapter"
    adapter.mkdir()
    shapes = {"A": (2, 24), "B": (24, 2)}
    names = {f"base_model.model.blocks.0.self_attn.q.lora_{part}.weight": shapes[part] for part in "AB"}
    toys.write_safetensors(adapter / FILES["peft"], names)
    (adapter / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    yield open_lora, adapter


def reason(read, path):
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return ""


def test_a_pipe_in_place_of_any_file_is_named(toys, tmp_path):
    replaced = []
    for read, path in checkpoints(toys, tmp_path):
        folder = path if path.is_dir() else path.parent
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        read(folder if read is open_experts else path)
        for file in files:
            file.rename(tmp_path / "aside")
            os.mkfifo(file)
            with within(2):
                said = reason(read, folder if read is open_experts else path)
            if said:  # what is not needed is not opened
                assert f"{file.name} is a named pipe" in said
                replaced.append(file.name)
            file.unlink()
            (tmp_path / "aside").rename(file)
    config = {"config.json", "adapter_config.json", "model_index.json"}
    weights = {"torch.pt", "model_optim_rng.pt", "adapter_model.safetensors", "latest_checkpointed_iteration.txt"}
    assert set(replaced) >= config | weights | {"diffusion_pytorch_model.safetensors.index.json"}


@pytest.mark.parametrize("line", ["inspect PIPE", "convert PIPE target", "diff PIPE PIPE", "inspect . --config PIPE"])
def test_every_command_ends(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("PIPE")
    with within(5), pytest.raises(SystemExit) as end:
        main(line.split())
    assert "PIPE is a named pipe" in str(end.value.code) + capsys.readouterr().err


# --- JSON, TOML, YAML


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1_000, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_json_is_one_clear_line(opening, depth, toys, tmp_path):
    source = toys.diffusers(tmp_path / "model")
    closing = "]" if opening == "[" else "}"
    (source / "config.json").write_text(f'{{"a": {opening * (depth - 1)}[]{closing * (depth - 1)}}}')
    with within(5), pytest.raises(ValueError, match=r"config\.json is not a JSON object: .*nested more than 64 deep"):
        open_checkpoint(source)


def test_json_of_usual_depth_is_read(tmp_path):
    (tmp_path / "a.json").write_text(f'{{"a": {nested(MAX_DEPTH - 1)}}}')
    assert read_json(tmp_path / "a.json")["a"]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_config_of_a_hundred_megabytes_is_not_parsed(toys, tmp_path):
    source = toys.diffusers(tmp_path / "model")
    (source / "config.json").write_bytes(b'{"a": [' + b"[]," * (33 * 2**20) + b"[]]}")
    with within(5), pytest.raises(ValueError, match=r"config\.json has 103,809,035 bytes, more than any"):
        open_checkpoint(source)


@pytest.mark.parametrize("value", ["[]", "1"])
def test_json_of_millions_of_values_is_not_parsed(value, tmp_path):
    (tmp_path / "a.json").write_text('{"a": [' + f"{value}," * 9_000_000 + "1]}")
    with within(5), pytest.raises(ValueError, match=r"a\.json .* more than 2,000,000 values"):
        read_json(tmp_path / "a.json")


def test_what_stands_in_text_is_no_value():
    assert len(parse_json(b'{"a": "' + b'[],\\"' * 2**20 + b'"}')["a"]) == 4 * 2**20


def header(path, raw):
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    return path


FLOODS = {
    "lists": b'{"a": [' + b"[]," * (25 * 2**20) + b"[]]}",
    "doubles": b"{" + b",".join(b'"%d": 0' % n for n in range(300_000)) + b', "299999": 0}',
    "a long name": b'{"' + b"a" * 10_000_000 + b'": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}',
    "many sides": b'{"a": {"dtype": "U8", "shape": ['
    + b"9223372036854775807," * 400_000
    + b'1],"data_offsets": [0, 1]}}',
    "a long number": b'{"a": {"dtype": "U8", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 1]}}',
    "metadata": b'{"__metadata__": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "a dtype of lists": b'{"a": {"dtype": ' + b"[" * 50 + b"]" * 50 + b', "shape": [], "data_offsets": [0, 1]}}',
}


@pytest.mark.parametrize("case", FLOODS)
def test_headers_that_ask_for_much(case, tmp_path):
    path = header(tmp_path / "model.safetensors", FLOODS[case])
    with within(10), pytest.raises(ValueError, match=r"model\.safetensors has a broken") as error:
        read_file(path)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("dtype", ["F4", "F7", "float32", "f32", "Q4_0", ""])
def test_an_unknown_dtype_is_refused(dtype, tmp_path):
    raw = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(ValueError, match=f"a is of dtype '{dtype}', which is none of BOOL, U8"):
        read_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "raw", [b"[1]", b"1", b'{"a": 1}', b'{"a": {"dtype": "U8", "shape": {}, "data_offsets": [0, 1]}}']
)
def test_a_header_of_another_form_is_said_in_our_words(raw, tmp_path):
    path = header(tmp_path / "model.safetensors", raw)
    with pytest.raises(ValueError, match=r"header: (it is .*, not an object|a is .*, not a dtype, a shape and two)"):
        read_file(path)


PATTERNS = {
    "choices": [".*" * 12 + "X"],
    "lazy choices": ["a?" * 30 + "a" * 30],
    "groups of groups": ["(.*)*(.*)*X"],
    "alternatives": ["(k|k)" * 40 + "X"],
    "parentheses": ["(" * 5000 + "a" + ")" * 5000],
    "many": [f"^x{i}.{'y' * 200}" for i in range(20_000)],
    "many choices": [f".*.*x{i}" for i in range(100)],
    "a repetition too large": ["a{99999999999}"],
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_that_take_long_to_match_are_refused(case, tmp_path):
    factors = {f"base_model.model.blocks.{i}.attn1.to_q.lora_{part}.weight": [4, 4] for i in range(40) for part in "AB"}
    table, position = {}, 0
    for name, shape in factors.items():
        table[name] = {"dtype": "U8", "shape": shape, "data_offsets": [position, position + 16]}
        position += 16
    raw = json.dumps(table).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(position))
    config = {"r": 4, "lora_alpha": 4, "rank_pattern": dict.fromkeys(PATTERNS[case], 4)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with within(10), pytest.raises(ValueError, match="has a rank_pattern that is not read") as error:
        open_lora(tmp_path)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize(
    "pattern", [r".*\.attn1\.to_(q|k)", r"blocks\.[0-9]\.attn1", "^blocks.0.attn1.to_q", r"blocks\.\d+\.(a|b).*"]
)
def test_usual_patterns_are_read(pattern):
    assert _read_patterns("rank_pattern", {"rank_pattern": {pattern: 4}}, "here")


TOML = ["a = " + nested(1000), "a" + ".a" * 50_000 + " = 1", "[" + "'a' . " * 50_000 + "a]", 'a = "' + "a." * 99 + '"']


@pytest.mark.parametrize("case", [0, 1, 2])
def test_deep_toml_is_one_clear_line(case, tmp_path):
    (tmp_path / "a.toml").write_text(TOML[case])
    with within(5), pytest.raises(ValueError, match=r"a\.toml is not TOML: .*nested more than 64 deep"):
        read_toml(tmp_path / "a.toml")


def test_toml_of_usual_depth_is_read(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf" + TOML[-1].encode())
    assert read_toml(tmp_path / "a.toml") == {"a": "a." * 99}


# --- pickles


def doubled(levels, opening=b"", make=b"\x86"):
    """A tuple of two tuples of two tuples, …: small as it is, it holds 2**levels numbers."""
    return b"K\0" + b"".join(b"q%b" % bytes([i]) + b"h%b" % bytes([i]) + make for i in range(levels))


def stored(path, program, **records):
    with path.open("wb") as file:
        archive = RecordWriter(file)
        for name, data in {"data.pkl": program, **records}.items():
            archive.write(f"archive/{name}", len(data), [data])
        archive.finish()
    return path


TUPLES = doubled(60)
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\n%bX\3\0\0\0cpuK\6tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("
ZERO, LONG = b"X\1\0\0\0000", b"\x8b\x90\1\0\0%bN"  # "0"; a number of 400 bytes
ALIKE = [((2**61 - 1) << n).to_bytes(400, "little") for n in range(3000)]  # all have the hash 0
PICKLES = {
    "key": b"}" + TUPLES + b"Ns",
    "keys": b"}(" + TUPLES + b"Nu",
    "key of a new dictionary": b"(" + TUPLES + b"Nd",
    "in a set": b"\x8f(" + TUPLES + b"\x90",
    "in a frozen set": b"(" + TUPLES + b"\x91",
    "in a set by name": b"cbuiltins\nset\n](" + TUPLES + b"e\x85R",
    "key of an ordered dictionary": b"ccollections\nOrderedDict\n](" + TUPLES + b"N\x86e\x85R",
    "storage": STORAGE % TUPLES,
    "metadata of a tensor": TENSOR + STORAGE % ZERO + b"K\0K\2K\3\x86K\3K\1\x86\x89}" + TUPLES + b"tR",
    "side of a tensor": TENSOR + STORAGE % ZERO + b"K\0" + TUPLES + b"\x85K\1\x85\x89}tR",
    "many sides": TENSOR
    + STORAGE % ZERO
    + b"K\0("
    + b"\x8a\x08"
    + bytes(7)
    + b"\1"
    + b"2" * 99_999
    + b"tK\1\x85\x89}tR",
    "keys that look alike": b"}(" + b"".join(LONG % number for number in ALIKE) + b"u",
    "empty tables": b"](" + b"}" * 3_000_000 + b"\x94" * 3_000_000 + b"e",
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_small_pickle_of_much_is_refused(case, tmp_path):
    path = stored(tmp_path / "model.pt", b"\x80\4" + PICKLES[case] + b".", **{"data/0": bytes(24)})
    with within(60, mebibytes=4000), pytest.raises(ValueError, match=r"model\.pt") as error:
        read_torch_file(path)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("key", [("a", 1), ((1, 2), ("a", frozenset("ab"))), 2**63, 1.5, b"a", None, True])
def test_usual_keys_are_read(key):
    content = {"a": {key: 1}, "set": {key}}
    assert unpickle(pickle.dumps(content, 4), "here", {}) == content


@pytest.mark.parametrize("keys", ["model", "state_dict"])
def test_a_dictionary_in_itself_ends(keys, tmp_path):
    name = b"X%b%b" % (len(keys).to_bytes(4, "little"), keys.encode())
    path = stored(tmp_path / "model.pt", b"\x80\2}q\0" + name + b"h\0s.")
    with within(5), pytest.raises(ValueError, match=r"model\.pt"):
        open_checkpoint(path)


TORCH = b"ctorch.distributed.checkpoint.metadata\n%b\n)\x81}("
DESCRIBED, PLACES, NAME = b"X\x13\0\0\0state_dict_metadata", b"X\x0c\0\0\0storage_data", b"X\3\0\0\0fqn"
PLACE = TORCH % b"MetadataIndex" + NAME + TUPLES + b"ub"
INDICES = {
    "a key": b"}" + TUPLES + b"Ns",
    "metadata": TORCH % b"Metadata" + DESCRIBED + TUPLES + b"ub",
    "names": TORCH % b"Metadata" + DESCRIBED + b"}" + TUPLES + b"Ns" + PLACES + b"}ub",
    "a place": TORCH % b"Metadata"
    + DESCRIBED
    + b"}"
    + PLACES
    + b"}"
    + TORCH % b"MetadataIndex"
    + NAME
    + TUPLES
    + b"ubNsub",
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_of_nested_tuples_is_refused(case, tmp_path):
    (tmp_path / ".metadata").write_bytes(b"\x80\4" + INDICES[case] + b".")
    with within(5), pytest.raises(ValueError, match=r"\.metadata is") as error:
        Index(tmp_path)
    assert len(str(error.value)) < 1_000
