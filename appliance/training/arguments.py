"""Recipe sections to the arguments of TRL and PEFT: pure functions, golden-tested.

What is switched off here is switched off on purpose: reports to third parties, hub pushes, the
learning-rate-halving batch finder, and the filter that shows a NaN loss as a running mean.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from appliance.method import (
    FullMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PrefixTuningMethod,
    PromptTuningMethod,
    QloraMethod,
)
from appliance.recipe import TrainingSection, count_steps, select_learning_rate

CHANGING_THE_BASE = ("pissa", "olora", "loftq")
_STARTS = ("gaussian", "orthogonal", "pissa", "olora", "mica")
_PROMPT_STARTS = {"vocabulary": "SAMPLE_VOCAB", "text": "TEXT", "random": "RANDOM"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def build_adapter_arguments(method: Method) -> dict[str, Any]:
    """Keyword arguments of the method's PEFT configuration; `full` has none.

    The tokenizer of `init: text` is a place, and is added where the base is known.
    """
    if isinstance(method, FullMethod):
        return {}
    if isinstance(method, LoraMethod):
        return _build_lora_arguments(method)
    if isinstance(method, Ia3Method):
        return {
            "target_modules": list(method.scaled),
            "feedforward_modules": list(method.scaled_at_input),
            "task_type": "CAUSAL_LM",
        }
    common = {"num_virtual_tokens": method.tokens, "task_type": "CAUSAL_LM"}
    if isinstance(method, PromptTuningMethod):
        text = {"prompt_tuning_init_text": method.text} if method.text is not None else {}
        return {**common, "prompt_tuning_init": _PROMPT_STARTS[method.init], **text}
    if isinstance(method, PrefixTuningMethod):
        return {
            **common,
            "init_weights": "zero" if method.init == "zero" else None,
            "prefix_projection": method.projection == "mlp",
            "encoder_hidden_size": method.hidden,
        }
    return {
        **common,
        "encoder_reparameterization_type": method.encoder.upper(),
        "encoder_hidden_size": method.hidden,
    }


def _build_lora_arguments(method: LoraMethod) -> dict[str, Any]:
    return {
        "r": method.rank,
        "lora_alpha": method.alpha if method.alpha is not None else 2 * method.rank,
        "lora_dropout": method.dropout,
        "target_modules": method.targets if isinstance(method.targets, str) else list(method.targets),
        "use_rslora": method.variant == "rslora",
        "use_dora": method.variant == "dora",
        "init_lora_weights": method.variant if method.variant in _STARTS else True,
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
    devices: int,
    bf16: bool,
    on_cpu: bool,
    checkpointing: bool,
    output: Path,
) -> dict[str, Any]:
    """Keyword arguments of `trl.SFTConfig`, which knows of one device: what it draws, several share."""
    steps = count_steps(section, rows=rows)
    every = max(1, math.ceil(steps / section.checkpoints))
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch * devices,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": section.effective_batch // (micro_batch * devices),
        "learning_rate": select_learning_rate(section, method),
        "lr_scheduler_type": _SCHEDULES[section.schedule],
        "warmup_steps": min(math.ceil(section.warmup_ratio * steps), steps - 1),  # its first step has rate 0
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
        "router_aux_loss_coef": 0.0,  # a loss of each micro-batch as a whole: their number would change what is learned
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
