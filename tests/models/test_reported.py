"""Cases reported of trainers in the field, as users meet them: a folder, settings, a whole run or a public
function.

Each is one member of a kind; the kinds are tested in the other files here. Nothing inside the package is
named, so that these tests say the same of any version of it.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from repsft_fast import train
from repsft_fast.errors import RepsftError
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from tests.helpers import runs, tiny
from tests.helpers.architectures import tiny_config

ROOT = Path(__file__).parents[2]
SHORT = {"budget": {"updates": 2}, "stop": {"token_accuracy": 1.0}}


def source(folder: Path, config, *, dtype=torch.float32) -> Path:
    """A saved tiny random model."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder / "base")
    return folder / "base"


def llama(folder: Path, **changes) -> Path:
    return source(folder, tiny.config("llama", **changes))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def settings(folder: Path, base: Path | str, **changes) -> dict:
    made = {**runs.settings(folder, samples=8), **SHORT, "model": {"path": str(base)}}
    return made | {name: {**made.get(name, {}), **value} for name, value in changes.items()}


def refusal(given: dict) -> str:
    """The words of the error; anything but one of ours fails."""
    with pytest.raises(RepsftError) as caught:
        train(given)
    return str(caught.value)


class TestWeightsThatNeverLoaded:
    """marin#779."""

    def test_a_foreign_prefix(self, tmp_path):
        base = llama(tmp_path)
        file = base / "model.safetensors"
        save_file(
            {f"module.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"}
        )
        words = refusal(settings(tmp_path, base))
        assert "module." in words
        assert "21" in words

    def test_one_layer_more_than_the_file_holds(self, tmp_path):
        base = llama(tmp_path)
        edit(base / "config.json", num_hidden_layers=3)
        words = refusal(settings(tmp_path, base))
        assert "model.layers.2" in words
        assert "model.init: random" in words

    def test_it_trains_when_whole(self, tmp_path):
        assert train(settings(tmp_path, llama(tmp_path))).updates == 2


class TestErrorsOfLibraries:
    """transformers#28122."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"intermediate_size": 80}, "80"),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
            ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
            ({"hidden_size": 30}, "model.path"),
            ({"vocab_size": "310"}, "vocab_size"),
            ({"vocab_size": 10**9}, "1000000000"),
        ],
        ids=str,
    )
    def test_the_configuration(self, changes, words, tmp_path):
        base = llama(tmp_path)
        edit(base / "config.json", **changes)
        assert words in refusal(settings(tmp_path, base))

    @pytest.mark.parametrize("text", ["[1, 2]", "[" * 100_000, '{"a":' * 100_000, '"llama"'], ids=len)
    def test_files_of_another_shape(self, text, tmp_path):
        base = llama(tmp_path)
        (base / "config.json").write_text(text)
        assert "config.json" in refusal(settings(tmp_path, base))

    def test_at_the_command_line(self, tmp_path):
        base = llama(tmp_path)
        (base / "config.json").write_text("[" * 100_000)
        (tmp_path / "run.yaml").write_text(json.dumps(settings(tmp_path, base)))
        command = [sys.executable, "-m", "repsft_fast", "train", "--config", str(tmp_path / "run.yaml")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert "config.json" in done.stderr


class TestAdapters:
    def test_gpt2_with_all_linear_is_merged(self, tmp_path):
        """peft#3531, axolotl#3095: transposed layers."""
        sizes = {"vocab_size": runs.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        base = source(tmp_path, GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
        result = train(settings(tmp_path, base, model={"lora": {"rank": 4, "merge": True}}))
        assert result.updates == 2
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        assert not torch.equal(
            merged.transformer.h[0].attn.c_attn.weight,
            load_file(base / "model.safetensors")["transformer.h.0.attn.c_attn.weight"],
        )

    @pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe"])
    def test_experts_with_the_default_are_merged(self, kind, tmp_path):
        base = source(tmp_path, tiny_config(kind))
        result = train(settings(tmp_path, base, model={"lora": {"rank": 4, "merge": True}}))
        assert result.updates == 2
        before, after = (
            load_file(base / "model.safetensors"),
            load_file(tmp_path / "run" / "model.safetensors"),
        )
        assert set(before) == set(after)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert any("q_proj" in name for name in moved)
        assert not any("gate.weight" in name for name in moved)  # routers stay as they are

    def test_dropout_with_adapters_of_experts(self, tmp_path):
        base = source(tmp_path, tiny_config("qwen3_moe"))
        lora = {"rank": 2, "dropout": 0.1, "target_modules": ["experts.down_proj"]}
        assert "dropout" in refusal(settings(tmp_path, base, model={"lora": lora}))

    def test_a_relative_base_is_found_from_anywhere(self, tmp_path, monkeypatch):
        llama(tmp_path)
        monkeypatch.chdir(tmp_path)
        train(settings(tmp_path, "./base", model={"lora": {"rank": 2}}))
        written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        assert os.path.isabs(written)
        assert os.path.samefile(written, tmp_path / "base")


class TestWhatIsComputed:
    def test_dynamic_frequencies_follow_each_sample(self, tmp_path):
        """Documents of 40, 25 and 33 positions where the model was made for 32: packed and one a row they
        learn the same."""
        config = tiny.config(
            "llama",
            max_position_embeddings=32,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
        )
        base = source(tmp_path, config)
        rows = [[3 + (7 * n + 5 * k) % 50 for k in range(n + 1)] for n in (40, 25, 33, 20)]
        (tmp_path / "train.jsonl").write_text(
            "".join(json.dumps({"input_ids": r, "labels": r}) + "\n" for r in rows)
        )
        losses = []
        for row_tokens in (41, 512):
            train(settings(tmp_path, base, batch={"row_tokens": row_tokens}, log={"every_updates": 1},
                           run={"folder": str(tmp_path / f"run{row_tokens}")}))  # fmt: skip
            lines = [
                json.loads(line)
                for line in (tmp_path / f"run{row_tokens}" / "metrics.jsonl").read_text().splitlines()
            ]
            losses.append([line["loss"] for line in lines if line["kind"] == "epoch"])
        assert losses[0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    @pytest.mark.parametrize(
        "kind", ["stablelm", "gptj", "gpt_neo", "qwen3_next", "lfm2", "granitemoehybrid"]
    )
    def test_what_takes_no_packed_rows_trains_one_sample_a_row(self, kind, tmp_path):
        base = source(tmp_path, tiny_config(kind))
        words = refusal(settings(tmp_path, base))
        assert "does not take packed rows" in words
        assert "batch.pack: false" in words
        result = train(
            settings(tmp_path, base, batch={"pack": False}, run={"folder": str(tmp_path / "alone")})
        )
        assert result.updates == 2
        assert result.loss < 20

    def test_attention_sinks_are_packed(self, tmp_path):
        result = train(settings(tmp_path, source(tmp_path, tiny_config("gpt_oss"))))
        assert result.updates == 2

    def test_padding_makes_no_nan(self, tmp_path):
        base = source(tmp_path, tiny_config("gemma3n_text"))
        result = train(settings(tmp_path, base, batch={"bucket_tokens": 16}))
        assert result.updates == 2
        after = load_file(tmp_path / "run" / "model.safetensors")
        assert all(value.isfinite().all() for value in after.values())

    def test_a_wide_head_beside_narrow_hidden_states(self):
        """As under autocast; Liger and CCE take it."""
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(6, 8, generator=draw).bfloat16().requires_grad_()
        head = torch.randn(11, 8, generator=draw).requires_grad_()
        loss = linear_cross_entropy(hidden, head, torch.tensor([1, 2, 3, 4, 5, 6]))
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        assert hidden.grad.isfinite().all()
        assert head.grad.isfinite().all()


class TestWhatIsSaved:
    def test_keys_types_and_the_tokenizers_class(self, tmp_path):
        """vllm#42624, LlamaFactory#10310."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        base = source(tmp_path, tiny.config("qwen2", vocab_size=runs.VOCABULARY), dtype=torch.bfloat16)
        edit(base / "config.json", rope_theta=1_000_000.0, torch_dtype="bfloat16")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")})
        )
        words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(runs.VOCABULARY)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(base)
        edit(
            base / "tokenizer_config.json",
            tokenizer_class="PreTrainedTokenizerFast",
            additional_special_tokens=["w7"],
        )
        train(settings(tmp_path, base))
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        assert saved["rope_theta"] == 1_000_000.0
        tokenizer = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert tokenizer["additional_special_tokens"] == ["w7"]
        assert {v.dtype for v in load_file(tmp_path / "run" / "model.safetensors").values()} == {
            torch.bfloat16
        }

    def test_file_modes_are_the_umasks(self, tmp_path):
        train(settings(tmp_path, llama(tmp_path)))
        mask = os.umask(0)
        os.umask(mask)
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert any(path.name == "model.safetensors" for path in files)
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}

    def test_tokens_that_were_added_to_the_tokenizer(self, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers

        base = source(tmp_path, tiny.config("qwen2", vocab_size=20))
        words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(20)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2")
        tokenizer.add_tokens(["new1", "new2"])
        tokenizer.save_pretrained(base)
        rows = [{"prompt": f"w{n} new1", "completion": f" w{n + 1} new2"} for n in range(3, 11)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "model.resize_vocabulary" in refusal(settings(tmp_path, base))
        train(
            settings(
                tmp_path, base, model={"resize_vocabulary": True}, run={"folder": str(tmp_path / "grown")}
            )
        )
        assert json.loads((tmp_path / "grown" / "config.json").read_text())["vocab_size"] >= len(tokenizer)
