"""Our words -> TRL's: the one place where a run file becomes an SFTConfig."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llmtune.config import Recorded

EVALUATIONS, CHECKPOINTS = 10, 4
"""About so many validations a run, unless train.eval_steps says otherwise; without validation, so many checkpoints."""


def total_steps(config: Recorded, rows: int) -> int:
    """Optimizer steps of the run."""
    if config.train.max_steps is not None:
        return int(config.train.max_steps)
    batches: int = math.ceil(rows / config.train.batch_size)
    return math.ceil(batches * float(config.train.epochs))


def to_trl(
    config: Recorded, *, rows: int, checkpoints: Path, device: str, mixed_bf16: bool, processes: int = 1
) -> dict[str, Any]:
    """Keyword arguments of trl.SFTConfig. Pure: it looks at nothing but its arguments.

    mixed_bf16: trainable weights are float32 and the arithmetic bfloat16 (autocast); off when weights are bfloat16 already.
    """
    train, validated = config.train, config.data.validation is not None
    steps = total_steps(config, rows)
    eval_steps = train.eval_steps if validated else None
    every = min(steps, eval_steps or max(1, steps // (EVALUATIONS if validated else CHECKPOINTS)))
    stopping = train.early_stopping
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": train.epochs if train.epochs is not None else 1.0,
        "max_steps": train.max_steps if train.max_steps is not None else -1,
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // (train.micro_batch_size * processes),
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "lr_scheduler_kwargs": dict(train.scheduler_options),
        "neftune_noise_alpha": train.neftune_alpha,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": train.optimizer,
        "activation_checkpointing": train.activation_checkpointing,
        "train_sampling_strategy": "group_by_length" if not config.data.packing and train.group_by_length else "random",
        "seed": train.seed,
        "data_seed": train.seed,
        "logging_steps": train.log_steps,
        "logging_nan_inf_filter": False,  # a NaN is to be seen, not averaged away
        "bf16": mixed_bf16,
        "fp16": False,
        "use_cpu": device == "cpu",
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": every if validated else None,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": None,  # checkpoints.rotate: transformers deletes an older one before the new one is sealed
        "restore_callback_states_from_checkpoint": True,  # early stopping's patience, on resume
        "load_best_model_at_end": validated,
        "metric_for_best_model": "loss" if validated else None,
        "greater_is_better": False if validated else None,
        "report_to": list(config.tracking) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "max_length": None,  # our rows are cut already; with a length TRL would drop rows without a word
        "packing": False,  # packed rows come packed already, each accounted for
        "dataloader_pin_memory": device != "cpu",
        "early_stopping": (stopping.patience, stopping.min_delta) if stopping is not None else None,
    }
