"""What stands where a model's file, its weights or the model itself should be is named as what it is, with
the way out."""

import os

import pytest

from repsft_fast.errors import ModelError
from repsft_fast.models import config_of, load_model, load_tokenizer
from tests.helpers.sources import write_source
from tests.models.test_guards import refused, shard

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
)


OTHER = (
    (POINTER, "is a pointer of Git LFS, not the file itself.*run git lfs pull"),
    (b"/annex/objects/MD5E-s1--0\n", "is a pointer of git-annex.*run git annex get"),
    (b"\n <!DOCTYPE html><html>404</html>", "is a web page, not the file itself"),
    (b"", "is empty.*fetch it again"),
    (b"\x1f\x8b\x08\x00rest", "is packed by gzip.*; unpack it"),
)
TEXT = (
    ("{}".encode("utf-16"), "is in UTF-16.*save it in UTF-8"),
    (b"\xef\xbb\xbf{}", "begins with a byte-order mark"),
)
BINARY = (
    (b"PK\x03\x04" + bytes(99), "is a zip archive, as torch.save writes it: a pickle, which is not read"),
    (b"\x80\x04" + b"x" * 99, "is a pickle, which is not read"),
    (b"GGUF\x03\0\0\0" + bytes(99), "is a GGUF file.*set model.path to it"),
)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_files_of_a_model(folder, name):
    for content, words in OTHER + (BINARY if name == "model.safetensors" else TEXT):
        (folder / name).write_bytes(content)
        refused(folder, rf"(?s)^model\.path {name}: .*({words})")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "chat_template.jinja",
    ],
)
def test_files_of_a_tokenizer(folder, name):
    for content, words in OTHER + (TEXT if name != "tokenizer.model" else ()):
        (folder / name).write_bytes(content)
        with pytest.raises(ModelError, match=rf"(?s)^tokenizer\.path {name}: .*({words})"):
            load_tokenizer(folder)


def test_one_part_of_the_weights(folder):
    shard(folder)
    (folder / "b.safetensors").write_bytes(POINTER)
    refused(folder, r"^model\.path b\.safetensors: is a pointer of Git LFS")


def test_files_that_are_not_read_may_be_pointers(tmp_path):
    """Fetched without what tokenizer.json makes needless, as git lfs pull --include does."""
    folder = write_source(tmp_path / "m")
    (folder / "tokenizer.model").write_bytes(POINTER)
    assert load_tokenizer(folder)("w5").input_ids == [5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "pytorch_model.bin",
            r"its weights are pickles \(pytorch_model.bin\), which may run code and are not read",
        ),
        ("consolidated.00.pth", "its weights are pickles"),
        ("model-00001-of-00001.safetensors", "rename model-00001-of-00001.safetensors to model.safetensors"),
        ("model.fp16.safetensors", "rename model.fp16.safetensors to model.safetensors"),
        ("consolidated.safetensors", "in the form of Mistral's own code"),
        ("adapter_model.safetensors", "holds adapters without their adapter_config.json"),
        ("m-Q4_K_M.gguf", "set model.gguf_file to one of them: m-Q4_K_M.gguf"),
        ("model.onnx", r"its weights are those of ONNX \(model.onnx\)"),
        ("flax_model.msgpack", "those of Flax"),
        ("zero_to_fp32.py", "those of DeepSpeed"),
        ("optimizer.pt", r"holds no weights \(model.safetensors, or its parts"),
    ],
)
def test_weights_under_other_names(folder, name, words):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, rf"^model\.path: .*({words})")
    assert load_model(folder, random_weights=True).lm_head.weight.shape == (97, 32)


def test_parts_without_their_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, r"2 files \(a.safetensors, b.safetensors\) without model.safetensors.index.json")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["m.gguf"], "holds GGUF files .*set model.path to one of them: .*m.gguf"),
        (["checkpoint-100/config.json"], "holds folders with models .*give one of them: .*checkpoint-100"),
        (["model_index.json"], "holds a pipeline of diffusers"),
        (["model.safetensors"], "no config.json that says of which model"),
        (["readme.md"], "the folder holds neither a model nor a tokenizer"),
    ],
)
def test_folders_of_something_else(tmp_path, names, words):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    refused(tmp_path, rf"^model\.path: .*{words}")
    with pytest.raises(ModelError, match=rf"^tokenizer\.path: .*{words}"):
        load_tokenizer(tmp_path)


def test_a_file_is_no_folder_in_any_way(folder):
    refused(folder / "config.json", "is a file.*give the folder it is in")
    assert config_of(folder / "config.json").model_type == "llama"


@pytest.mark.parametrize(
    "name", ["my model (1)", "模型", "a%20b", "foo.gguf", "foo.safetensors", "[x]*", "a\nb", "x" * 200]
)
def test_names_of_folders_that_are_right(folder, name):
    moved = folder.rename(folder.parent / name)
    assert load_model(f"{moved}/").lm_head.weight.shape == (97, 32)


def test_a_name_that_is_no_text(folder):
    moved = folder.rename(os.fsdecode(os.fsencode(folder.parent) + b"/\xff"))
    refused(moved, r"^model\.path: has a name that is not UTF-8")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may become another")
def test_files_that_may_not_be_read(folder):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).chmod(0)
    folder.chmod(0o755)
    for at in folder.parents:
        # pytest's own, of which xdist has one more
        if at.owner() == folder.owner() and not at.stat().st_mode & 0o005:
            at.chmod(at.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            refused(folder, rf"^model\.path {name}: .*Permission denied")
            os.seteuid(0)
            (folder / name).chmod(0o644)
            os.seteuid(65534)
        assert load_model(folder).load_said == []
    finally:
        os.seteuid(0)
