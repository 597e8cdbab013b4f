"""Recipe sections to the arguments of TRL and PEFT: pure functions, golden-tested.

What is switched off here is switched off on purpose: reports to third parties, hub pushes, the
learning-rate-halving batch finder, and the filter that shows a NaN loss as a running mean.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from appliance.recipe import LoraMethod, Method, QloraMethod, TrainingSection

_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
_INITIALISATION = {"pissa": "pissa", "olora": "olora"}


def select_learning_rate(section: TrainingSection, method: Method) -> float:
    """The recipe's rate, or the usual one of the method."""
    return section.learning_rate if section.learning_rate is not None else _RATES[method.type]


def count_steps(section: TrainingSection, *, rows: int) -> int:
    """Optimizer steps of the whole run; the last batch of an epoch may be smaller."""
    return max(1, math.ceil(math.ceil(rows / section.effective_batch) * section.epochs))


def build_adapter_arguments(method: LoraMethod | QloraMethod) -> dict[str, Any]:
    """Keyword arguments of `peft.LoraConfig`."""
    return {
        "r": method.rank,
        "lora_alpha": method.alpha if method.alpha is not None else 2 * method.rank,
        "lora_dropout": method.dropout,
        "target_modules": method.targets if isinstance(method.targets, str) else list(method.targets),
        "use_rslora": method.variant == "rslora",
        "use_dora": method.variant == "dora",
        "init_lora_weights": _INITIALISATION.get(method.variant, True),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def build_training_arguments(
    section: TrainingSection,
    *,
    method: Method,
    rows: int,
    has_validation: bool,
    micro_batch: int,
    bf16: bool,
    on_cpu: bool,
    checkpointing: bool,
    output: Path,
) -> dict[str, Any]:
    """Keyword arguments of `trl.SFTConfig` for one device."""
    steps = count_steps(section, rows=rows)
    every = max(1, math.ceil(steps / section.checkpoints))
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": section.effective_batch // micro_batch,
        "learning_rate": select_learning_rate(section, method),
        "lr_scheduler_type": section.schedule,
        "warmup_steps": math.ceil(section.warmup_ratio * steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": "paged_adamw_8bit" if isinstance(method, QloraMethod) else "adamw_torch_fused",
        "seed": section.seed,
        "data_seed": section.seed,
        "bf16": bf16,
        "use_cpu": on_cpu,
        "fp16": False,
        "gradient_checkpointing": checkpointing,
        "eval_strategy": "steps" if has_validation else "no",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": None,  # older ones go when the newest is sealed, see checkpoints.py
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "auto_find_batch_size": False,
        "train_sampling_strategy": "random",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "report_to": [],
        "push_to_hub": False,
        "disable_tqdm": True,
        "packing": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
