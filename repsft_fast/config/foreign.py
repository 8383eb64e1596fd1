"""Other trainers' names of settings, and what is set here instead. Never applied: the meaning is near, not
the same.

Names: Hugging Face's TrainingArguments and TRL's SFTConfig (Unsloth takes both), peft, Axolotl,
LLaMA-Factory, ms-swift, torchtitan, torchtune, Lightning and NeMo. Their words for values are in
`foreign_values`; docs/coming_from.md is made of both.
"""

import re

from repsft_fast.errors import did_you_mean

# What to set here → their names for it. A name with a dot means that name in that section alone. A key that
# is a setting is asked about ("did you mean …?"), any other is a sentence; every setting it names exists and
# takes the value written after it.
NAMES = {
    # the model
    "model.path":
    "model_name_or_path base_model model_name pretrained_model_name_or_path model_id model_path base_model_name_or_path "
    "hf_assets_path initial_load_path checkpoint_dir checkpoint_files",
    "the model's own config.json says it: drop it":
    "model_type model_flavor flavor model.name architectures model.type tokenizer_type base_model_config "
    "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model converters",
    "tokenizer.path":
    "tokenizer_name_or_path tokenizer_path tokenizer_name base_model_tokenizer tokenizer_config processing_class",
    "tokenizer.chat_template, Jinja text or the path of a file with it; null: the tokenizer's own":
    "chat_template_path chat_template_jinja template prompt_template prompt_style conversation_template jinja_template_path",
    "the tokenizer's own tokens are used, and tokenizer.special_tokens says how their text in the data is read; "
    "model.resize_vocabulary: true gives new ones rows":
    "special_tokens added_tokens_overrides pad_token eos_token bos_token unk_token new_special_tokens add_tokens "
    "add_special_tokens",
    "model.resize_vocabulary": "resize_vocab resize_token_embeddings resize_token_embeddings_to_32x",
    "write it into the rows, as a turn of the system": "default_system_message default_system system_prompt system",
    "model.compute_dtype: bfloat16, which auto is on a GPU (weights stay float32: model.param_dtype)":
    "bf16 torch_dtype dtype mixed_precision precision bfloat16 pure_bf16 bf16_full_eval mixed_precision_param "
    "mixed_precision_reduce",
    "model.compute_dtype: float32": "float32",
    "float16 is not computed in, bfloat16 is: drop it (model.compute_dtype)":
    "fp16 float16 half fp16_full_eval fp16_opt_level",
    "there is no training in 8-bit floats: drop it": "fp8 enable_fp8 float8 fp8_recipe",
    "drop it: model.compute_dtype says what is computed in": "tf32 bf16_backend half_precision_backend",
    "weights are not quantised in training: drop it; model.lora, optim.name: adamw8bit and model.activation_checkpointing: "
    "full save memory":
    "load_in_4bit load_in_8bit quantization quantization_bit quantization_method quant_method quant_bits "
    "double_quantization bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_config "
    "quantization_config gptq qlora quantize_base use_qlora llm_int8_threshold",
    "model.attention":
    "flash_attention attn_implementation _attn_implementation flash_attn attn_impl use_flash_attention_2 use_flash_attn "
    "sdp_attention sdpa_attention xformers_attention flex_attention eager_attention attn_type",
    "model.layer_kernels: liger":
    "use_liger_kernel use_liger enable_liger_kernel liger_kernel_config liger_rope liger_rms_norm liger_glu_activation "
    "liger_swiglu unsloth_rms_norm unsloth_rope flash_attn_rms_norm use_unsloth unsloth_lora_mlp unsloth_lora_qkv "
    "unsloth_lora_o lora_mlp_kernel",
    "the head's logits are never kept, whatever is set: drop it":
    "liger_fused_linear_cross_entropy liger_cross_entropy unsloth_cross_entropy_loss flash_attn_cross_entropy "
    "cut_cross_entropy num_output_chunks chunked_cross_entropy",
    "model.activation_checkpointing: full, or selective":
    "gradient_checkpointing enable_gradient_checkpointing use_gradient_checkpointing gradient_checkpointing_kwargs "
    "enable_activation_checkpointing activation_checkpoint activation_checkpoint.mode activation_checkpointing_kwargs "
    "selective_ac_option recompute_granularity",
    "model.activation_checkpointing: none": "disable_gradient_checkpointing",
    "activations are not moved to the host: model.activation_checkpointing: full or a smaller batch.row_tokens saves memory":
    "activation_offloading enable_activation_offloading cpu_offload enable_cpu_offload fsdp_cpu_offload offload_params",
    "model.compile": "torch_compile use_compile enable_compile compile.enable torch_compile_backend torch_compile_mode",
    "all weights are trained, or, with model.lora, adapters beside them: drop it":
    "unfrozen_parameters freeze_trainable_layers freeze_trainable_modules freeze_extra_modules freeze_layers "
    "freeze_parameters trainable_parameters freeze_vision_tower",
    "model.init: random":
    "train_from_scratch from_scratch random_init",
    "fetch that revision, and give its folder (model.path)":
    "revision model_revision revision_of_model base_model_revision",
    "drop it, or change the model's own config.json":
    "model_init_kwargs overrides_of_model_config model_kwargs config_overrides model_overrides upcast_layernorm",
    "models read text alone here: drop it":
    "media_dir max_pixels freeze_vit freeze_llm freeze_aligner image_folder image_max_pixels vision_lr",
    # adapters
    "model.lora: {rank: 16} for adapters, null for every weight":
    "adapter adapters lora use_peft use_lora finetuning_type peft_type train_type tuner_type peft peft_method peft_scheme "
    "apply_lora_to_mlp apply_lora_to_output fine_tuning_type",
    "model.lora.rank": "lora_r lora_rank peft_lora_rank lora.r peft.r peft_config.r lora_config.r r lora_dim adapter_dim",
    "model.lora.alpha": "lora_alpha lora_scaling",
    "model.lora.dropout": "lora_dropout adapter_dropout",
    "model.lora.target_modules":
    "lora_target_modules lora_target lora_attn_modules lora_target_linear lora_modules target_parameters "
    "lora_target_parameters",
    "model.lora.from": "lora_model_dir adapter_name_or_path adapter_path adapter_checkpoint adapter_folder",
    "model.lora.merge": "merge_lora merge_and_unload merge_adapters",
    "adapters are plain LoRA here: drop it (model.lora)":
    "use_dora use_rslora use_qalora use_bdlora loraplus_lr_ratio loraplus_lr_embedding lora_plus_scale peft_use_dora "
    "peft_use_rslora lora_bias bias init_lora_weights modules_to_save lora_modules_to_save additional_target "
    "lora_fan_in_fan_out fan_in_fan_out layers_to_transform peft_layers_to_transform rank_pattern alpha_pattern "
    "loftq_config pissa_init relora_steps task_type inference_mode create_new_adapter lora_on_cpu",
    # the data
    "data.train":
    "dataset datasets dataset_name dataset_path train_file train_files data_path data.path train_data train_path "
    "training_data training_file training_files train_dataset train_set data_files dataset_mixer dataset_mixture "
    "dataset_dir data_dir dataset.source source pretraining_dataset dataset_id",
    "data.validation":
    "eval_dataset validation_file validation_files val_data val_dataset val_file val_files val_path eval_file valid_data "
    "valid_file validation_data validation_dataset test_datasets eval_data eval_path dataset_val",
    "data.test": "test_dataset test_file test_files test_data test_path",
    "data.validation_fraction":
    "val_set_size val_size val_split validation_split validation_split_percentage eval_split_ratio split_dataset_ratio "
    "test_size eval_ratio val_ratio validation_ratio",
    "data.split": "dataset_split dataset_train_split train_split split_name train_on_split",
    "name the subset in the source, as owner/name:subset (data.train)":
    "dataset_config_name dataset_config subset dataset_subset dataset.name",
    "data.samples": "max_samples max_train_samples num_samples sample_size num_train_samples max_train_size",
    "validation rows are read whole: drop it, or set data.validation to fewer":
    "max_eval_samples max_val_samples limit_val_batches eval_iters max_predict_samples",
    "rows are recognised by their keys (data.format; docs/data.md): rename the column, or drop it":
    "dataset_format formatting dataset_text_field text_column text_field text_column_name field_messages "
    "message_property_mappings message_field_role message_field_content prompt_column response_column completion_column "
    "column_mapping columns column_map prompt_field completion_field response_field conversation_column message_field "
    "messages_field input_key output_key prompt_key response_key dataset_kwargs field field_instruction field_output "
    "conversation_key train_on_split_field data.type dataset.type data.prompt_template formatting_func dataset_type",
    "data.ignore_columns": "remove_unused_columns ignored_columns remove_columns",
    "replies are trained on, prompts are not, and data.train_on: last leaves all but the last reply out (docs/data.md)":
    "completion_only_loss assistant_only_loss train_on_inputs train_on_input train_on_prompt train_on_responses_only "
    "train_on_completions_only mask_history mask_prompt roles_to_train masking_strategy loss_scale train_on_eos "
    "train_on_eot train_on_source ignore_pad_token_for_loss label_mask response_template instruction_template mask_inputs "
    "answer_only_loss loss_on_prompt prompt_loss_weight",
    "data.max_tokens (data.overlong: truncate cuts what is longer, drop leaves it out); batch.row_tokens is the length of a "
    "packed row":
    "max_length max_seq_length max_seq_len max_sequence_length cutoff_len model_max_length sequence_len seq_len seq_length "
    "sequence_length context_length context_len block_size max_token_length max_len max_tokens_per_sample "
    "encoder_seq_length maxlen max_context_length max_prompt_len max_prompt_length max_packed_sequence_len",
    "data.overlong":
    "truncation truncation_mode truncation_strategy excess_length_strategy truncate_long_seq truncation_side "
    "sample_length_strategy",
    "data.cache_folder":
    "cache_dir dataset_prepared_path tokenized_path preprocessed_dir cached_path dataset_cache_dir data_cache_dir "
    "cache_path",
    "the cache knows its rows by their content: drop it":
    "overwrite_cache load_from_cache_file skip_prepare_dataset is_preprocess",
    "rows are tokenised once and lie in memory: drop it":
    "dataloader_num_workers num_workers dataset_num_proc dataset_processes preprocessing_num_workers dataloader_pin_memory "
    "dataloader_prefetch_factor dataloader_persistent_workers pin_memory prefetch_factor dataloader_drop_last drop_last "
    "streaming buffer_size preprocessing_batch_size num_proc dataloader_multiprocessing_context dataloader_in_order "
    "num_data_workers",
    "every epoch is shuffled by run.seed: drop it":
    "shuffle shuffle_dataset shuffle_data shuffle_merged_datasets shuffle_buffer_size dataset_shuffle "
    "train_dataloader_shuffle disable_shuffling",
    "rows are packed, so samples of one length need not meet: drop it":
    "group_by_length length_column_name train_sampling_strategy length_group batch_sampler curriculum_sampling",
    "mixture.weights":
    "interleave_probs mix_strategy dataset_weights sampling_ratios dataset_mixer_weights mixing_weights data_weights blend",
    # our own, of earlier versions
    "drop it: a task that only falls may leave too, once its fall is no noise (mixture.alpha)": "mixture.min_progress",
    "tokenizer.template_kwargs: {enable_thinking: false}": "enable_thinking chat_template_kwargs",
    # the batch
    "batch.samples: the samples of one optimizer step over all GPUs (per device × accumulated × GPUs); how many pass at "
    "once follows from batch.row_tokens":
    "per_device_train_batch_size per_gpu_train_batch_size gradient_accumulation_steps gradient_accumulation "
    "accumulate_grad_batches grad_accum_steps grad_acc_steps grad_accumulation_steps micro_batch_size micro_batchsize "
    "train_batch_size train_micro_batch_size train_micro_batch_size_per_gpu mini_batch_size batch_size local_batch_size "
    "device_batch_size batch_size_per_device device_train_microbatch_size batch_size_training accumulation_steps "
    "gradient_accumulation_iters micro_train_batch_size bs grad_accum",
    "batch.samples": "global_batch_size total_batch_size effective_batch_size global_train_batch_size",
    "validation rows are packed as training rows are (batch.row_tokens): drop it":
    "per_device_eval_batch_size eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps val_batch_size "
    "validation_batch_size eval_packing eval_sample_packing batch_size_val",
    "numbers.on_out_of_memory: retry": "auto_find_batch_size",
    "batch.pack":
    "packing sample_packing neat_packing multipack pack_sequences do_pack packed packed_sequence use_packing "
    "packing_strategy sample_packing_bin_size sample_packing_group_size sample_packing_sequentially group_texts",
    "rows are packed without padding, and samples in one never see each other: drop it (batch.pack)":
    "padding_free batch_flattening multipack_real_batches pretrain_multipack_attn",
    "batch.bucket_tokens": "pad_to_multiple_of pad_to_sequence_len pad_to_max_length",
    # the optimizer
    "optim.lr": "learning_rate lr_max max_lr peak_lr base_lr max_learning_rate initial_lr init_lr optimizer_lr",
    "every weight has the one rate optim.lr: drop it":
    "embedding_lr embedding_lr_scale embedding_learning_rate lr_groups backbone_lr layerwise_lr_decay lr_embedding "
    "lr_div_factor",
    "optim.name": "optimizer optimizer_type optimizer_name optimizer_class optim_name optimizer.type optimizer_cls",
    "optim.betas: [0.9, 0.999], both in one":
    "adam_beta1 adam_beta2 beta1 beta2 adam_betas beta_1 beta_2 adamw_beta1 adamw_beta2",
    "optim.betas: [0.9, 0.999], whose first is the momentum of sgd": "momentum sgd_momentum",
    "there is no Nesterov momentum: drop it": "nesterov use_nesterov",
    "optim.eps": "adam_epsilon adam_eps epsilon optimizer_eps",
    "optim.weight_decay": "wd adam_weight_decay decay_weight",
    "optim.max_norm (null: no clipping)":
    "max_grad_norm gradient_clipping clip_grad_norm clip_grad grad_clip gradient_clip gradient_clip_val max_gradient_norm "
    "grad_norm_clip clip_norm grad_clipping max_norm_clip grad_max_norm",
    "each is a setting of its own (optim.betas, optim.eps, optim.weight_decay): drop it":
    "optim_args optimizer_kwargs optim_kwargs",
    "an optimizer is named whole, by optim.name: drop it":
    "implementation fused foreach optimizer_in_bwd early_step_in_backward torchdistx_path optim_target_modules use_galore "
    "galore_rank use_apollo use_badam badam_mode",
    "parts are chosen by name, not by class (optim.name, schedule.name, model.path): drop it":
    "_component_ _target_ class_path",
    # the schedule
    "optim.warmup_fraction":
    "warmup_ratio lr_warmup_ratio warmup_proportion warmup_percent warmup_frac warmup_pct warmup_ratios",
    "optim.warmup_fraction (a share of the budget) or optim.warmup_updates": "warmup lr_warmup",
    "optim.warmup_updates":
    "warmup_steps num_warmup_steps lr_warmup_steps warmup_iters lr_warmup_iters n_warmup_steps num_warmup_updates "
    "lr_warmup_samples",
    "schedule.name":
    "lr_scheduler_type lr_scheduler scheduler scheduler_type lr_schedule lr_schedule_type lr_decay_style lr_scheduler_name "
    "decay_type learning_rate_schedule lr_scheduler.type scheduler.type "
    "schedule.type",
    "schedule.decay_fraction": "decay_ratio cooldown_fraction lr_decay_ratio decay_frac",
    "cosine and linear fall to 0, wsd decays to 0 in schedule.decay_fraction: drop it":
    "min_lr min_lr_ratio lr_end lr_min min_lr_factor cosine_min_lr_ratio cosine_constant_lr_ratio lr_scheduler_kwargs "
    "min_learning_rate end_lr final_lr lr_scheduler_args num_cycles lr_quadratic_warmup decay_steps num_decay_steps "
    "num_stable_steps lr_decay_iters",
    # the length of a run
    "budget.epochs (and stop.token_accuracy: null to pass over the data so often whatever is learned before)":
    "num_train_epochs num_epochs n_epochs max_epochs train_epochs total_epochs nb_epochs epoch num_epoch number_of_epochs",
    "budget.updates (and stop.token_accuracy: null to make so many whatever is learned before)":
    "max_steps num_steps total_steps train_steps max_train_steps num_training_steps total_training_steps training_steps "
    "steps max_iters train_iters iterations num_iterations total_iters n_steps num_train_steps max_iterations "
    "total_train_steps max_updates",
    "budget.updates, or fewer samples: data.samples": "max_steps_per_epoch steps_per_epoch limit_train_batches",
    "stop.plateau_epochs": "early_stopping_patience early_stopping early_stop_patience stop.patience",
    "stop.plateau_min_delta": "early_stopping_threshold early_stopping_min_delta",
    # evaluation
    "evaluate.every_epochs (0.25: four times in an epoch)":
    "eval_steps eval_strategy evaluation_strategy eval_interval evaluation_interval evals_per_epoch eval_every eval_freq "
    "eval_frequency val_check_interval validation_freq validation.freq eval_delay run_val_every_n_steps validate_every "
    "evaluation_steps check_val_every_n_epoch val_interval eval_every_n_epochs test_freq eval_epochs "
    "evaluate.every",
    "what is trained is validated when data.validation or data.validation_fraction is set: drop it":
    "do_train do_eval do_predict evaluate_during_training validation.enable eval_on_start prediction_loss_only "
    "do_causal_lm_eval predict_with_generate",
    "evaluate.keep: best, which goes by validation loss":
    "load_best_model_at_end metric_for_best_model greater_is_better save_best keep_best_only save_best_only",
    "evaluate.generate_samples": "eval_table_size num_generations_eval log_samples",
    "evaluate.generate_tokens": "eval_max_new_tokens eval_table_max_new_tokens max_new_tokens generation_max_length",
    # what is written
    "run.folder":
    "output_dir out_dir save_dir dump_folder output_folder output_path save_path results_dir output default_local_dir "
    "save_folder out_path default_root_dir checkpoint.folder export_dir run.name",
    "a folder in use is never overwritten: choose a new run.folder, or continue with the flag --resume":
    "overwrite_output_dir overwrite overwrite_output",
    "the flag --resume continues the run in run.folder":
    "resume resume_from_checkpoint auto_resume_from_checkpoints resume_checkpoint resume_training auto_resume resume_mode "
    "resume_from ignore_data_skip load_checkpoint recipe_checkpoint enable_autoresume load_step",
    "log.every_updates":
    "logging_steps log_every_n_steps log_every log_freq log_interval logging_interval logging_strategy logging_first_step "
    "steps_per_print log_steps print_freq log_frequency",
    "log.trackers: [wandb], trackio or tensorboard; there the run has the name of run.folder":
    "report_to wandb use_wandb wandb_project wandb_entity wandb_name wandb_run_name wandb_run_id wandb_watch "
    "wandb_log_model enable_wandb use_tensorboard enable_tensorboard tensorboard run_name experiment_name trackio_space_id "
    "tracker with_tracking metric_logger swanlab_project use_swanlab use_mlflow mlflow_tracking_uri use_comet comet_api_key "
    "project_name wandb_mode logger project",
    "run.png and result.json are always written: drop it": "plot_loss logging_dir log_dir logging_folder save_tb_folder",
    "log.peak_flops": "peak_flops_per_second gpu_peak_flops device_flops",
    "checkpoint.every_updates or checkpoint.every_minutes":
    "save_steps save_strategy saves_per_epoch save_interval save_every save_freq save_frequency checkpoint_interval "
    "checkpoint_every checkpoint.interval checkpointing_steps checkpoint.enable enable_checkpoint save_epochs "
    "save_every_epoch save_every_n_steps every_n_train_steps checkpoint_freq save_last interval",
    "checkpoint.keep_last":
    "save_total_limit keep_latest_k max_checkpoints max_to_keep checkpoints_total_limit keep_last_n num_checkpoints "
    "max_ckpt_to_keep save_top_k checkpoint.keep",
    "models are safetensors and checkpoints hold what a resume needs: drop it (model.save_dtype says in what types)":
    "save_safetensors save_only_model save_on_each_node save_optimizer save_model save_adapter_weights_only "
    "last_save_model_only export_dtype save_compressed safe_serialization model_weights_only save_format save_tokenizer",
    "nothing is uploaded: drop it, and upload run.folder yourself":
    "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision push_dataset_to_hub "
    "hf_use_auth_token push_to_hub_model_id",
    "run.seed": "random_seed data_seed manual_seed global_seed rng_seed train_seed random_state",
    "run.deterministic":
    "full_determinism use_deterministic_algorithms cudnn_deterministic_mode deterministic_mode enable_full_determinism",
    # machines
    "ranks share the weights by themselves (FSDP2): drop it; distributed.shard_ranks says how many share a copy":
    "deepspeed deepspeed_config zero_stage zero_optimization fsdp fsdp_config fsdp_version fsdp_final_state_dict_type ddp "
    "fsdp_sharding_strategy fsdp_transformer_layer_cls_to_wrap parallelism_config accelerator_config ddp_backend "
    "ddp_timeout ddp_bucket_cap_mb ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph distributed_backend "
    "strategy custom_sharded_layers reshard_after_forward use_fsdp enable_fsdp hsdp dp_degree",
    "distributed.shard_ranks":
    "data_parallel_shard_degree data_parallel_replicate_degree dp_shard dp_replicate dp_shard_size "
    "data_parallel_replicate_dim data_parallel_shard_dim hybrid_shard_size",
    "ranks are data parallel alone: drop it (distributed.shard_ranks)":
    "tensor_parallel_degree tensor_parallel_size tensor_model_parallel_size tensor_parallel_dim pipeline_parallel_degree "
    "pipeline_model_parallel_size pipeline_parallel_size context_parallel_degree context_parallel_size "
    "sequence_parallel_degree sequence_parallel sequence_parallel_size expert_parallel_degree expert_model_parallel_size "
    "tp_size pp_size cp_size tp_plan",
    "the launcher says which GPUs and how many (torchrun, srun; docs/cluster.md), and without one it is this machine's: "
    "drop it":
    "device device_map devices use_cpu no_cuda num_gpus n_gpus n_gpu num_nodes nnodes nproc_per_node world_size local_rank "
    "gpus accelerator gpu_ids num_processes num_machines gpu_memory_limit max_memory low_cpu_mem_usage "
    "place_model_on_device",
    "numbers.on_spike": "loss_watchdog_threshold loss_watchdog_patience spike_threshold loss_spike_threshold",
    "the flag --dry-run prints the plan and trains nothing": "dry_run fast_dev_run print_config preview",
    # what is not here
    "no noise is added to embeddings: drop it": "neftune_noise_alpha neftune_alpha neft_alpha noisy_embedding_alpha",
    "targets are not smoothed: drop it": "label_smoothing_factor label_smoothing label_smoother",
    "the loss is the cross entropy of the next token: drop it (loss.average says how samples are weighed)":
    "loss_type loss.type loss.name loss_fn loss_func use_dft_loss compute_loss_func router_aux_loss_coef router_loss_weight "
    "aux_loss_coef kd_temperature distill",
    "loss.average: token": "average_tokens_across_devices loss_reduction token_level_loss",
    "this trains on given replies alone: drop it":
    "stage rl dpo_beta pref_beta pref_loss orpo_alpha simpo_gamma kto_desirable_weight kto_undesirable_weight reward_model "
    "rl_beta rpo_alpha cpo_alpha rlhf_type",
    "drop it: long lengths are the model's own (its config.json)":
    "rope_scaling rope_theta use_pose yarn shift_attn s2_attention",
    "drop it; the command line has --traceback, and metrics.jsonl holds what was measured":
    "debug log_level disable_tqdm skip_memory_metrics include_num_input_tokens_seen include_tokens_per_second "
    "torch_empty_cache_steps empty_cache_steps logging_nan_inf_filter log_on_each_node use_cache gc_steps gc_freq "
    "profiler_steps log_peak_memory_stats",
}  # fmt: skip

# Sections of theirs that are nearly one of ours: what is in them is looked for there.
SECTIONS = {
    "optimizer": "optim", "optimizers": "optim", "optimiser": "optim", "lr_scheduler": "schedule", "scheduler": "schedule",
    "lora": "model.lora", "peft": "model.lora", "peft_config": "model.lora", "lora_config": "model.lora", "datasets": "data",
    "dataset": "data", "checkpointer": "checkpoint", "checkpointing": "checkpoint", "logging": "log", "evaluation": "evaluate",
    "eval": "evaluate", "validation": "evaluate", "metrics": "log",
}  # fmt: skip

_OURS = {name: ours for ours, names in NAMES.items() for name in names.split()}


def plain(name: str) -> str:
    """A name in the one spelling of the tables: learningRate, Learning-Rate and LEARNING_RATE are
    learning_rate."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[-\s]+", "_", split).lower()


def ours(name: str) -> str | None:
    """What to set here instead of another trainer's setting, under its bare name or in any section: a setting
    or a sentence."""
    steps = plain(name).split(".")
    bare = re.sub(r"^(?:no|use|enable|disable)_", "", steps[-1])
    return next((_OURS[key] for key in (".".join(steps[-2:]), steps[-1], bare) if key in _OURS), None)


def nearly(name: str) -> str | None:
    """The same for a slip of the pen in such a name. Short words are alike by chance: `type` and `dtype`."""
    word = plain(name).rpartition(".")[2]
    near = did_you_mean(word, _OURS, cutoff=0.88) if len(word) > 5 else None
    return _OURS[near] if near else None


def question(found: str) -> str:
    """The end of the sentence about a name that is no setting. found: a setting, a section or a sentence."""
    if re.fullmatch(r"[a-z]+(?:\.[a-z_]+)*", found):
        return f"did you mean {found}?"
    return f"here it is {found}" if re.match(r"[a-z]+(?:\.[a-z_]+)+", found) else found
