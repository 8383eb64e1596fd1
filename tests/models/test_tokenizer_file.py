"""Text is split as tokenizer.json says, whatever class transformers takes for it; its own classes' files are
left to them."""

import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repsft_fast.errors import ModelError
from repsft_fast.models import load_tokenizer, save_pretrained
from repsft_fast.models.tokenizer_file import as_the_file_says
from tests.helpers.sources import change, read, write, write_source

TEXT = "w5 w6 w7"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))  # words between spaces


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "m")


def without_class(folder):
    settings = read(folder / "tokenizer_config.json")
    settings.pop("tokenizer_class")
    write(folder / "tokenizer_config.json", settings)


def ids_of_the_library(folder):
    try:
        return AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    except Exception:  # it has no token for what is unknown
        return None


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", "GemmaTokenizerFast"]
)
def test_a_class_that_splits_otherwise(folder, name):
    change(folder / "tokenizer_config.json", tokenizer_class=name)
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT).input_ids == [5, 6, 7]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 0, 97)
    assert bool(tokenizer.load_said) == (ids_of_the_library(folder) != [5, 6, 7])
    for said in tokenizer.load_said:
        assert said.startswith("tokenizer.path: transformers makes a ")
        assert "it is read as tokenizer.json says" in said


@pytest.mark.parametrize("kind", ["qwen2", "gemma", "gpt2", "gpt_neox", "bert"])
def test_an_architecture_whose_tokenizer_is_another(folder, kind):
    """transformers takes the architecture's class where tokenizer_config.json names none, for qwen2 in spite
    of it."""
    change(folder / "config.json", model_type=kind)
    without_class(folder)
    assert load_tokenizer(folder)(TEXT).input_ids == [5, 6, 7]


def test_a_class_named_plainly_is_heard_by_every_architecture(folder):
    change(folder / "config.json", model_type="qwen2")
    assert read(folder / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(folder)(TEXT).input_ids == [5, 6, 7]


def test_what_is_saved_is_the_file_again(folder, tmp_path):
    change(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    from repsft_fast.models import load_model

    save_pretrained(load_model(folder), load_tokenizer(folder), tmp_path / "result")
    was, now = (read(at / "tokenizer.json") for at in (folder, tmp_path / "result"))
    assert (was["model"], was["pre_tokenizer"]) == (now["model"], now["pre_tokenizer"])
    assert read(tmp_path / "result" / "tokenizer_config.json")["tokenizer_class"] == "Qwen2Tokenizer"
    assert load_tokenizer(tmp_path / "result")(TEXT).input_ids == [5, 6, 7]


def byte_level(folder, *, prefix=False):
    """A file as GPT-2's and Qwen's are: bytes, no merges."""
    tokenizer = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def pieces(folder, *, old):
    """A file as Llama's are, in transformers 4's form (old) or 5's."""
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = {
        t: i
        for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters])
    }
    merges = [("▁", letter) for letter in "abcdefgh"]
    vocabulary |= {f"▁{letter}": len(vocabulary) + i for i, letter in enumerate("abcdefgh")}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if old:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("GPT2Tokenizer", byte_level),
        ("Qwen2Tokenizer", None),
        ("LlamaTokenizer", lambda folder: pieces(folder, old=False)),
        ("LlamaTokenizer", lambda folder: pieces(folder, old=True)),
    ],
)
def test_files_of_the_class_itself_are_left_to_it(folder, name, make):
    write(folder / "tokenizer_config.json", {"tokenizer_class": name})
    (folder / "special_tokens_map.json").unlink()
    if make is None:  # as the class writes it
        byte_level(folder)
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    else:
        make(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.load_said == []
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(folder))


def test_a_setting_that_every_reader_hears_is_no_difference(folder):
    """`add_prefix_space` of tokenizer_config.json goes over the file's, in transformers 4 as in 5."""
    byte_level(folder)
    (folder / "special_tokens_map.json").unlink()
    write(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})
    before = AutoTokenizer.from_pretrained(folder)("a b", add_special_tokens=False).input_ids
    tokenizer = load_tokenizer(folder)
    assert tokenizer("a b", add_special_tokens=False).input_ids == before
    assert tokenizer.load_said == []


def test_code_that_came_with_it_is_asked_for_and_not_corrected(folder):
    class Own(PreTrainedTokenizerFast):
        pass

    own = Own.from_pretrained(folder)
    assert as_the_file_says(own, folder, "tokenizer.path") == (own, [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_max_length": "x"}, r"^tokenizer\.path tokenizer_config\.json: TypeError"),
        ({"eos_token": 5}, r"^tokenizer\.path: "),
        ({"padding_side": "middle"}, r"^tokenizer\.path: "),
    ],
)
def test_settings_of_another_type_show_here(folder, changes, words):
    change(folder / "tokenizer_config.json", **changes)
    with pytest.raises(ModelError, match=words):
        load_tokenizer(folder)


def test_a_config_that_is_the_reason_is_named(folder):
    change(folder / "config.json", model_type=["llama"])
    with pytest.raises(ModelError, match=r"^model\.path config\.json: .*unhashable.*correct it"):
        load_tokenizer(folder, setting="model.path")


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "T5Tokenizer"])
def test_settings_without_a_vocabulary_are_no_tokenizer(folder, name):
    """transformers makes an empty one of the class's name: every text would be no tokens at all."""
    (folder / "tokenizer.json").unlink()
    write(folder / "tokenizer_config.json", {"tokenizer_class": name})
    with pytest.raises(
        ModelError, match=r"^tokenizer\.path: holds no tokenizer, only special tokens.*fetch it"
    ):
        load_tokenizer(folder)


def test_a_vocabulary_of_bytes_or_of_three_words_is_one(tmp_path):
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    assert load_tokenizer(tmp_path)("a").input_ids[0] == 100
    (tmp_path / "tokenizer_config.json").unlink()
    words = Tokenizer(models.WordLevel({"A": 0, "B": 1, "?": 2}, unk_token="?"))
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path)("B").input_ids == [1]


def test_a_tokenizer_of_code_that_may_not_run_names_the_setting(folder):
    (folder / "tokenizer.json").unlink()
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
    )
    with pytest.raises(ModelError, match=r"^tokenizer\.path: .*set model\.trust_remote_code to true"):
        load_tokenizer(folder)


@pytest.mark.parametrize("setting", ["tokenizer.path", "model.path"])
@pytest.mark.parametrize("settings", [True, False])
def test_a_model_without_its_tokenizer(folder, setting, settings):
    for name in ["tokenizer.json", *(["tokenizer_config.json"] if not settings else [])]:
        (folder / name).unlink()
    with pytest.raises(
        ModelError, match=rf"^{setting}: holds no tokenizer.*fetch it, or set tokenizer\.path"
    ):
        load_tokenizer(folder, setting=setting)
