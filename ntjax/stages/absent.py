"""Settings of transformers and TRL that no stage has here, and why."""

from __future__ import annotations

_TORCH = "it steers PyTorch"
_LOADER = "the data plan is made once, and loading follows it"
_FILLED = "a step's rows are filled in any case (padding_free)"
_HUB = "ntjax uploads nothing"
_TOP_LEVEL = "it is a setting of the whole run"
_PROGRESS = "the run prints its progress, and use_wandb and use_tensorboard at the top level say where else"
_MEMORY = "plan says beforehand what fits"

# What transformers' TrainingArguments has and no JAX trainer could mean.
ABSENT = {
    "torch_*": _TORCH,
    "tf32": _TORCH,
    "ddp_*": _TORCH,
    "fsdp*": "[mesh] fsdp shards the weights",
    "accelerator_config": _TORCH,
    "parallelism_config": "[mesh] says it",
    "local_rank": _TORCH,
    "use_cpu": 'device = "cpu" in [model] says it',
    "no_cuda": 'device = "cpu" in [model] says it',
    "use_liger_kernel": "the loss never holds whole logits in any case",
    "liger_kernel_config": "the loss never holds whole logits in any case",
    "gradient_checkpointing_kwargs": "checkpointing has one form here, around each layer",
    "activation_checkpointing*": "gradient_checkpointing says it",
    "auto_find_batch_size": _MEMORY,
    "skip_memory_metrics": _MEMORY,
    "dataloader_*": _LOADER,
    "train_sampling_strategy": _FILLED,
    "group_by_length": _FILLED,
    "length_column_name": _FILLED,
    "label_names": "a batch has the fields its stage needs",
    "push_to_hub*": _HUB,
    "hub_*": _HUB,
    "trackio_*": _PROGRESS,
    "report_to": _PROGRESS,
    "run_name": "task_name at the top level names the run",
    "project": "wandb_project at the top level says it",
    "log_level*": _PROGRESS,
    "disable_tqdm": _PROGRESS,
    "debug": "python -m ntjax.train --debug says it",
    "optim_args": "each optimizer's settings have names of their own",
    "optim_target_modules": "no optimizer here works on chosen modules only",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "eval_accumulation_steps": "evaluation keeps sums, not predictions",
    "eval_do_concat_batches": "evaluation keeps sums, not predictions",
    "eval_use_gather_object": "evaluation keeps sums, not predictions",
    "batch_eval_metrics": "evaluation keeps sums, not predictions",
    "include_*": "every logging step counts the tokens seen",
    "save_only_model": "a checkpoint always resumes exactly; the finished stage is the model alone",
    "save_on_each_node": "all hosts write one checkpoint together",
    "restore_callback_states_from_checkpoint": "there are no callbacks",
    "overwrite_output_dir": "every run has a folder of its own",
    "full_determinism": "runs are reproducible without it",
    "do_predict": "python -m ntjax.generate does it",
    "use_cache": "training keeps no key-value cache",
    "resume_from_checkpoint": _TOP_LEVEL,
    "ignore_data_skip": _TOP_LEVEL,
    "logging_dir": _TOP_LEVEL,
    "model_init_kwargs": "[model] has the model's settings",
    "trust_remote_code": "nothing remote is ever run",
    "dataset_text_field": "text_field in [datasets.NAME] says it",
    "dataset_kwargs": "it is a setting of [datasets.NAME]",
    "dataset_num_proc": "preprocessing_num_workers in [datasets.NAME] says it",
    "shuffle_dataset": "shuffle in [datasets.NAME] says it",
}
