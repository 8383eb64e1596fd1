"""The mixin against the losses of the trainers it is put into: Hugging Face's Trainer and TRL's
SFTTrainer."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, Trainer, TrainingArguments

from repsft_fast.errors import ConfigError, ModelError
from repsft_fast.integrations.hf import FusedHeadMixin, extend_forward
from repsft_fast.ops import products
from tests.helpers import tiny

SIZES = {name: value for name, value in tiny.config("llama").to_dict().items() if name in tiny._SIZES}
LENGTHS = (9, 5, 14, 7, 11, 6, 8, 12)


class Fast(FusedHeadMixin, Trainer):
    pass


def model(name="llama", dtype=torch.float64, **changes):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(
        tiny.config(name, **changes), dtype=dtype, attn_implementation="eager"
    )


def rows(prompt=2):
    """Unequal numbers of trained tokens, so that a mean of means is not the mean."""
    found = []
    for n, ids in enumerate(tiny.documents([n - 1 for n in LENGTHS])):
        masked = prompt + n % 3
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return found


def collate(examples):
    longest = max(len(e["input_ids"]) for e in examples)

    def padded(key, value):
        return torch.tensor([e[key] + [value] * (longest - len(e[key])) for e in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def build(kind, folder, its_model=None, data=None, **changes):
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4,
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 2, "report_to": [], "use_cpu": True,
            "save_strategy": "no", "disable_tqdm": True, "seed": 1, **changes,
        }
    )  # fmt: skip
    data = Dataset.from_list(rows() if data is None else data)
    return kind(
        model=its_model or model(),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def close(ours, theirs, rtol=1e-6):
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=rtol, atol=0.0)


class TestTrainer:
    @pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
    def test_loss_and_gradients_are_the_trainers_own(self, tmp_path, items):
        results = []
        for kind in (Trainer, Fast):
            trainer = build(kind, tmp_path)
            loss = trainer.compute_loss(trainer.model, collate(rows()), num_items_in_batch=items)
            loss.backward()
            results.append((loss.detach().double(), {n: p.grad for n, p in trainer.model.named_parameters()}))
        (theirs, their_gradients), (ours, our_gradients) = results
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)  # Hugging Face takes its loss in fp32
        assert their_gradients.keys() == our_gradients.keys()
        for name, gradient in their_gradients.items():
            assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_a_run_logs_the_same_losses_and_ends_at_the_same_weights(self, tmp_path, accumulation):
        trainers = [
            build(kind, tmp_path, gradient_accumulation_steps=accumulation, optim="sgd")
            for kind in (Trainer, Fast)
        ]
        theirs, ours = (losses(trainer) for trainer in trainers)
        assert len(theirs) == 2
        close(ours, theirs, rtol=1e-5)
        for a, b in zip(trainers[0].model.parameters(), trainers[1].model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    def test_token_accuracy_is_exact_over_the_logged_updates(self, tmp_path):
        trainer = build(Fast, tmp_path, learning_rate=0.0, max_steps=2, logging_steps=2)
        plain, right, total = model(), 0, 0
        for example in rows():  # two updates of two microbatches of two rows: every row once
            batch = collate([example])
            with torch.no_grad():
                answers = plain(input_ids=batch["input_ids"]).logits[0, :-1].argmax(-1)
            targets = batch["labels"][0, 1:]
            right += int((answers == targets)[targets != -100].sum())
            total += int((targets != -100).sum())
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["trained_tokens"] == total
        assert logged["token_accuracy"] == right / total
        assert trainer.token_stats == {}

    def test_evaluation_gives_their_loss_and_exact_counts_without_logits(self, tmp_path, monkeypatch):
        theirs = build(Trainer, tmp_path).evaluate()
        trainer = build(Fast, tmp_path)
        monkeypatch.setattr(
            products, "add_head_gradient", lambda *_, **__: pytest.fail("a gradient in evaluation")
        )
        monkeypatch.setattr(trainer.model.lm_head, "forward", lambda *_: pytest.fail("full logits"))
        ours = trainer.evaluate()
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
        assert ours["eval_trained_tokens"] == sum(x != -100 for row in rows() for x in row["labels"][1:])
        assert 0 <= ours["eval_token_accuracy"] <= 1
        assert ours["eval_entropy"] > 0

    def test_evaluation_with_metrics_still_gets_logits(self, tmp_path):
        seen = []
        results = []
        for kind in (Trainer, Fast):
            trainer = build(kind, tmp_path, data=[rows()[0]] * 4)
            trainer.compute_metrics = lambda p: seen.append(p.predictions) or {}
            results.append(trainer.evaluate()["eval_loss"])
        assert results[1] == pytest.approx(results[0], rel=1e-6)
        torch.testing.assert_close(torch.tensor(seen[0]), torch.tensor(seen[1]))

    def test_an_all_masked_batch_is_zero_with_zero_gradients(self, tmp_path):
        trainer = build(Fast, tmp_path)
        batch = collate(rows())
        one = batch["labels"].clone()
        batch["labels"].fill_(-100)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert loss.item() == 0.0
        assert all(bool((p.grad == 0).all()) for p in trainer.model.parameters() if p.grad is not None)
        one[1:] = -100
        one[0, :8] = -100  # a single trained token
        batch["labels"] = one
        theirs, ours = (
            t.compute_loss(t.model, dict(batch)).item() for t in (build(Trainer, tmp_path), trainer)
        )
        assert ours == pytest.approx(theirs, rel=1e-6)

    @pytest.mark.parametrize("kind", ["tied", "soft-capped", "scaled"])
    def test_other_heads(self, tmp_path, kind):
        pair = []
        for trainer in (Trainer, Fast):
            torch.manual_seed(3)
            match kind:
                case "tied":
                    its = model("llama-tied")
                case "soft-capped":
                    its = AutoModelForCausalLM.from_config(
                        Gemma2Config(**SIZES, final_logit_softcapping=0.5, head_dim=8)
                    )
                case "scaled":
                    its = AutoModelForCausalLM.from_config(CohereConfig(**SIZES, logit_scale=0.3))
            pair.append(build(trainer, tmp_path, its))
        theirs, ours = (t.compute_loss(t.model, collate(rows())).item() for t in pair)
        assert ours == pytest.approx(theirs, rel=1e-6)

    def test_bf16_autocast_stays_within_its_rounding(self, tmp_path):
        pair = [build(kind, tmp_path, model(dtype=torch.float32), bf16=True) for kind in (Trainer, Fast)]
        theirs, ours = (losses(trainer) for trainer in pair)
        close(ours, theirs, rtol=2**-8)  # one bf16 rounding of the logits

    def test_generation_and_saving_are_what_they_were(self, tmp_path):
        plain, trainer = model(), build(Fast, tmp_path)
        prompt = torch.tensor([[5, 6, 7]])
        expected = plain.eval().generate(prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(trainer.model.eval().generate(prompt, max_new_tokens=5, do_sample=False), expected)
        trainer.save_model(str(tmp_path / "saved"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trainer.model.parameters()))


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"label_smoothing_factor": 0.1}, "label smoothing"),
            ({"use_liger_kernel": True}, "use_liger_kernel"),
        ],
    )
    def test_what_needs_full_logits_is_refused_when_built(self, tmp_path, changes, message):
        with pytest.raises(ConfigError, match=message):
            build(Fast, tmp_path, **changes)

    def test_an_own_loss_function_is_refused(self, tmp_path):
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        with pytest.raises(ConfigError, match="compute_loss_func"):
            Fast(model=model(), args=arguments, compute_loss_func=lambda *a, **k: None)

    def test_a_head_that_is_more_than_a_linear_layer_is_refused(self):
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(
            model(), peft.LoraConfig(target_modules=["lm_head"], r=2, task_type="CAUSAL_LM")
        )
        with pytest.raises(ModelError, match="plain linear layer"):
            extend_forward(adapted.get_base_model())

    def test_a_head_with_a_transform_nobody_named_is_refused(self):
        odd = model()
        hook = odd.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
        with pytest.raises(ModelError, match="transforms its logits"):
            extend_forward(odd)
        hook.remove()

    def test_a_forward_replaced_later_is_noticed(self, tmp_path):
        trainer = build(Fast, tmp_path)
        trainer.model.forward = lambda **inputs: {"loss": torch.zeros(())}
        with pytest.raises(ModelError, match="forward was replaced"):
            trainer.compute_loss(trainer.model, collate(rows()))


def test_lora_on_the_backbone_trains_with_the_fused_head(tmp_path):
    peft = pytest.importorskip("peft")
    results = []
    for kind in (Trainer, Fast):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False
        )
        trainer = build(kind, tmp_path, peft.get_peft_model(model(), config))
        results.append(losses(trainer))
        assert all(p.grad is None for p in trainer.model.get_base_model().lm_head.parameters())
    close(results[1], results[0], rtol=1e-5)


class TestSftTrainer:
    """Packed rows: position ids restart in every document, and no target crosses a border."""

    def build(self, kind, folder, **changes):
        trl = pytest.importorskip("trl")
        from tests.helpers.chat_tokenizers import byte_level

        arguments = trl.SFTConfig(
            **{
                "output_dir": str(folder), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3,
                "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "use_cpu": True,
                "save_strategy": "no", "disable_tqdm": True, "seed": 1, "max_length": 32, "packing": True, "bf16": False,
                "gradient_checkpointing": False, "eos_token": None, "optim": "sgd", **changes,
            }
        )  # fmt: skip
        data = Dataset.from_list(rows())
        return kind(
            model=model(),
            args=arguments,
            train_dataset=data,
            eval_dataset=data,
            processing_class=byte_level(),
        )

    def kinds(self):
        trl = pytest.importorskip("trl")

        class FastSft(FusedHeadMixin, trl.SFTTrainer):
            pass

        return trl.SFTTrainer, FastSft

    def test_packed_losses_and_weights_are_trls_own(self, tmp_path):
        trainers = [self.build(kind, tmp_path) for kind in self.kinds()]
        batch = next(iter(trainers[0].get_train_dataloader()))
        assert (batch["position_ids"] == 0).sum() > 1, "several documents in a row"
        theirs, ours = (losses(trainer) for trainer in trainers)
        close(ours, theirs, rtol=1e-5)
        for a, b in zip(trainers[0].model.parameters(), trainers[1].model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    def test_its_accuracy_is_theirs_where_a_log_is_one_batch(self, tmp_path):
        lines = []
        for kind in self.kinds():
            trainer = self.build(kind, tmp_path, gradient_accumulation_steps=1)
            trainer.train()
            lines.append([line for line in trainer.state.log_history if "loss" in line])
        for theirs, ours in zip(*lines):
            assert ours["token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"], rel=1e-6)
            assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)

    def test_evaluation_is_theirs(self, tmp_path):
        """One batch, where the mean of batches' means is the mean."""
        theirs, ours = (
            self.build(kind, tmp_path, per_device_eval_batch_size=8).evaluate() for kind in self.kinds()
        )
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
        assert ours["eval_token_accuracy"] == pytest.approx(theirs["eval_mean_token_accuracy"], rel=1e-6)

    def test_another_loss_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="loss_type dft"):
            self.build(self.kinds()[1], tmp_path, loss_type="dft")
