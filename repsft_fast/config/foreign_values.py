"""Other trainers' words for values of our settings, and the one setting that is meant where a section is
given one value."""

from typing import Any

# Values of theirs under our names: setting → {ours: their words}. What stands before a comma is valid there;
# "-" is nothing.
VALUES: dict[str, dict[str, str]] = {
    "optim.name": {
        "adamw":
        "adamw_torch adamw_torch_fused adamw_hf adam fused_adam adamw_fused adamw_32bit paged_adamw_32bit adamw_apex_fused "
        "torch.optim.adamw adamw_anyprecision",
        "adamw8bit, or bnb_adamw8bit": "adamw_8bit adamw_bnb_8bit paged_adamw_8bit adam8bit pagedadamw8bit adam_8bit",
        "bnb_adamw8bit": "adamw_bnb8bit bitsandbytes.optim.adamw8bit",
        "torchao_adamw8bit": "adamw_torch_8bit adamw_torchao_8bit torchao.optim.adamw8bit",
        "sgd": "torch.optim.sgd momentum",
        "adamw, as this one is not here":
        "adafactor lion lion_8bit paged_lion_8bit muon rmsprop adagrad ademamix schedule_free_adamw",
    },
    "schedule.name": {
        "constant, whose warm-up is optim.warmup_fraction": "constant_with_warmup const none constantlr flat",
        "wsd": "warmup_stable_decay trapezoidal",
        "cosine, which falls to 0":
        "cosine_with_min_lr cosine_with_restarts cosine_annealing cosineannealing cosine_warmup_with_min_lr",
        "linear, whose warm-up is optim.warmup_fraction": "linear_with_warmup polynomial linear_decay",
        "wsd, as this one is not here": "inverse_sqrt reduce_lr_on_plateau one_cycle rex greedy",
    },
    "model.compute_dtype": {
        "bfloat16": "bf16 torch.bfloat16 bfloat bf16-mixed bf16-true",
        "float32": "fp32 torch.float32 float 32 32-true f32",
        "bfloat16, as float16 is not computed in": "fp16 half torch.float16 f16 float16 16-mixed",
    },
    "model.param_dtype": {
        "bfloat16": "bf16 torch.bfloat16 bfloat bf16-mixed bf16-true",
        "float32": "fp32 torch.float32 float 32 32-true f32",
        "bfloat16, as float16 is not computed in": "fp16 half torch.float16 f16 float16 16-mixed",
    },
    "model.save_dtype": {
        "bfloat16": "bf16 torch.bfloat16 bfloat bf16-mixed bf16-true",
        "float32": "fp32 torch.float32 float 32 32-true f32",
        "float16": "fp16 half torch.float16 f16",
    },
    "model.attention": {
        "flash2, or auto": "flash_attention_2 flash_attention fa2 flash_attn flash true",
        "flash3": "flash_attention_3 fa3",
        "flash4": "flash_attention_4 fa4",
        "sdpa": "eager math xformers flex_attention flex none false",
    },
    "model.activation_checkpointing": {
        "full": "true unsloth on yes block memory_budget",
        "none": "false off no",
        "selective": "op",
    },
    "model.layer_kernels": {
        "liger": "true unsloth",
        "none": "false off",
    },
    "data.format": {
        "conversations": "sharegpt share_gpt",
        "messages": "chatml chat_template chat openai conversational chat_completion",
        "prompt": "prompt_completion prompt-completion instruct",
        "text": "completion pretrain pretraining language_modeling plain",
        "alpaca": "instruction alpaca_chat",
        "input_ids": "tokenized pretokenized tokens",
        "segments": "input_output",
    },
    "data.overlong": {
        "truncate": "truncation cut true keep_start right left longest_first",
        "drop": "skip delete filter false",
        "raise": "error",
    },
    "data.on_bad_row": {
        "drop": "skip ignore",
        "raise": "error stop",
    },
    "data.train_on": {
        "all": "assistant completion responses completions replies",
        "last": "last_turn final",
    },
    "loss.average": {
        "token": "mean tokens token_mean num_items_in_batch",
        "sample": "samples sequence seq_mean",
    },
    "optim.max_norm": {
        "null": "0 0.0 none false off",
    },
    "budget.updates": {
        "null": "-1 none",
    },
    "budget.epochs": {
        "null": "-1 none",
    },
    "batch.bucket_tokens": {
        "auto": "true",
    },
    "log.trackers": {
        "[wandb]": "wandb",
        "[tensorboard]": "tensorboard",
        "[trackio]": "trackio",
        "[]": "none null false -",
        "[wandb], trackio or tensorboard": "all mlflow swanlab comet_ml neptune clearml",
    },
    "evaluate.keep": {
        "best": "true best_model",
        "last": "false latest",
    },
    "mixture.policy": {
        "null": "none concat mix false",
        "msft": "m-sft",
    },
}  # fmt: skip

# The one setting meant by a word that is a section here: `model: owner/name`.
SCALARS = {
    "run": "run.folder", "model": "model.path", "tokenizer": "tokenizer.path", "data": "data.train", "batch": "batch.samples",
    "loss": "loss.average", "optim": "optim.name", "schedule": "schedule.name", "budget": "budget.epochs",
    "stop": "stop.token_accuracy", "evaluate": "evaluate.every_epochs", "numbers": "numbers.on_nonfinite",
    "log": "log.every_updates", "checkpoint": "checkpoint.every_updates", "mixture": "mixture.policy",
    "distributed": "distributed.shard_ranks", "snapshot": "snapshot.device_bytes", "model.lora": "model.lora.rank",
}  # fmt: skip

_OURS = {
    setting: {"" if word == "-" else word: here for here, words in values.items() for word in words.split()}
    for setting, values in VALUES.items()
}


def value_of(setting: str, value: Any) -> str | None:
    """What another trainer's value is called here; None: it is none that is known."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str | int | float):
        return None
    return _OURS.get(setting, {}).get(str(value).strip().lower())
