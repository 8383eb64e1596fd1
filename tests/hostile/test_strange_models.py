"""Models from strangers: no pickle is read, and what cannot be trained is refused in words."""

import json
import pickle
import sys

import pytest
import torch

from repsft_fast.errors import ModelError
from repsft_fast.models import load_model, load_tokenizer
from tests.helpers import tiny


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.repsft_was_unpickled = True",)


@pytest.mark.parametrize("content", ["weights", "bomb"])
def test_a_folder_with_only_a_pickle_is_refused_unread(tmp_path, content):
    import builtins

    tiny.config("llama").save_pretrained(tmp_path)
    if content == "bomb":
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"model.embed_tokens.weight": torch.zeros(97, 32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.path"):
        load_model(tmp_path)
    assert not hasattr(builtins, "repsft_was_unpickled")


def test_a_damaged_safetensors_file_is_named(tmp_path):
    tiny.config("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"model\.path"):
        load_model(tmp_path)


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Code beside models is copied to a folder of this test alone, and forgotten after it: the name of its
    package is one."""
    folder = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]
        sys.path[:] = [path for path in sys.path if path != folder]

    forget()
    yield folder
    forget()


@pytest.mark.parametrize("asked", [False, True])
def test_code_beside_a_model_runs_only_when_asked_for_by_name(tmp_path, own_modules, asked):
    """`asked` is the control: the same folder does run its code then."""
    folder = tmp_path / "model"
    folder.mkdir()
    auto = {"AutoConfig": "strange.StrangeConfig", "AutoTokenizer": ["strange.StrangeTokenizer", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
    trace = tmp_path / "trace"
    # an exit is refused too
    (folder / "strange.py").write_text(f"open({str(trace)!r}, 'w').close()\nraise SystemExit(7)\n")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"^(model|tokenizer)\.path config\.json: "):
            load(folder, trust_remote_code=asked)
    assert trace.exists() == asked
