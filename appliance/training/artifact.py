"""What a finished training leaves: the artifact, in place only when complete, and how it was made."""

from __future__ import annotations

import gc
import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer

from appliance.digest import digest_folder, rename_whole
from appliance.errors import TrainingError
from appliance.method import FullMethod
from appliance.model.shapes import count_values, read_weight_shapes
from appliance.model.weights import Precision, keeping_generation, load_model
from appliance.recipe import select_learning_rate
from appliance.training import attention
from appliance.training.checkpoints import is_sound, make_readable, name_checkpoint
from appliance.training.journal import Journal
from appliance.training.launch import TrainingJob
from appliance.training.levers import Levers
from appliance.training.methods import Weights, load_encoder, subtract_start
from appliance.training.monitor import Rules, Watched
from appliance.training.sharding import gather_weights, put_weights


def finish_weights(model: Any, job: TrainingJob, *, precision: Precision, keeps: bool) -> Weights | None:
    """A full model in the precision it is published in; its weights whole where ranks hold parts, see `sharding`."""
    if isinstance(job.method, FullMethod):
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return gather_weights(model, keeps=keeps)


def save_artifact(model: Any, job: TrainingJob, *, start: Weights, weights: Weights | None) -> None:
    """Write the adapter (or the full model) beside its place, then rename: equal weights, equal bytes.

    `weights` are those of a model whose own are shared out.
    """
    staged = job.adapter.with_name(f".{job.adapter.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    if isinstance(job.method, FullMethod):
        with keeping_generation(model, staged):
            model.save_pretrained(staged, state_dict=weights)
        AutoTokenizer.from_pretrained(job.base, local_files_only=True).save_pretrained(staged)
    else:
        model.save_pretrained(staged)
        (staged / "README.md").unlink(missing_ok=True)  # the card takes its place
        if start:
            subtract_start(staged, start)
        _normalise_config(staged / "adapter_config.json", base_name=job.base_name, is_difference=bool(start))
    make_readable(staged)
    shutil.rmtree(job.adapter, ignore_errors=True)
    rename_whole(staged, job.adapter)


def _normalise_config(file: Path, *, base_name: str, is_difference: bool) -> None:
    """No path of this machine, and sets in one order, so that equal adapters have equal digests.

    A difference to a start has twice the rank, at the same scale alpha / rank. The scale alpha / sqrt(rank) of rslora
    is written as alpha / rank, too: llama.cpp and Ollama know no other, and would apply another one without a word.
    """
    config = json.loads(file.read_text("utf-8"))
    config["base_model_name_or_path"] = base_name
    if config.get("tokenizer_name_or_path"):
        config["tokenizer_name_or_path"] = base_name
    if is_difference:
        config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    if config.get("use_rslora") and not config["rank_pattern"] and not config["alpha_pattern"]:
        alpha = config["lora_alpha"] * math.sqrt(config["r"])
        config |= {"use_rslora": False, "lora_alpha": int(alpha) if alpha.is_integer() else alpha}
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            config[key] = sorted(value)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def load_kept_weights(model: Any, checkpoints: Path, *, step: int) -> None:
    """Put the weights of a step's checkpoint into `model`, in the dtype they were trained in."""
    checkpoint = checkpoints / name_checkpoint(step)
    if not is_sound(checkpoint):
        raise TrainingError(
            f"{checkpoint}: the best step's checkpoint is damaged; run the same command: it goes on from one that does "
            "not need it, or starts over"
        )
    if load_encoder(model, checkpoint):
        return
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        return
    load_parts(model, checkpoint)


def load_parts(model: Any, checkpoint: Path) -> None:
    """Put the weights of a checkpoint of full training into `model`, whole or this rank's part of them."""
    kept = load_model(checkpoint, precision="fp32", device=torch.device("cpu"))
    put_weights(model, dict(kept.named_parameters()))


def build_summary(
    job: TrainingJob,
    model: Any,
    journal: Journal,
    *,
    seen: Watched,
    rules: Rules,
    kept_step: int,
    levers: Levers,
    precision: Precision,
    device: torch.device,
) -> dict[str, Any]:
    """What the manifest and the card record of the training; the weights are those of `kept_step`."""
    losses = [r["loss"] for r in journal.records if "loss" in r]
    last = max((r for r in journal.records if "loss" in r), key=lambda r: r["step"])
    kept = next((e for e in seen.evaluations if e.step == kept_step), None)
    gc.collect()
    return {
        "steps": last["step"],
        "max_steps": rules.max_steps,
        "stopped_by": "patience" if seen.is_stopped else "max_steps",
        "kept": rules.keep if seen.best else "last",
        "kept_step": kept_step,
        "kept_validation_loss": kept.loss if kept else None,
        "kept_validation_exact_match": kept.exact_match if kept else None,
        "alerts": [a.to_json() for a in seen.alerts],
        "epochs": job.training.epochs,
        "seconds": last["seconds"],
        "tokens": last["tokens"],
        "tokens_computed": last["tokens_computed"],
        "tokens_per_second": round(last["tokens"] / max(last["seconds"], 1e-9), 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "best_validation_loss": min((e.loss for e in seen.evaluations), default=None),
        "last_validation_loss": seen.evaluations[-1].loss if seen.evaluations else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": count_values(read_weight_shapes(job.base)),  # of the base, as the plan counts them
        "micro_batch": job.micro_batch,
        "effective_batch": job.training.effective_batch,
        "learning_rate": select_learning_rate(job.training, job.method),
        "dtype": precision,
        "device": name_device(device),
        "threads": torch.get_num_threads(),
        "levers": levers.to_json(),
        "attention": attention.name_used(model),
        "packing": levers.rows == "packed",
        "peak_memory_bytes": measure_peak_memory(device),
        "adapter_sha256": digest_folder(job.adapter),
    }


def name_device(device: torch.device) -> str:
    """What the driver calls the GPU, or `cpu`."""
    return device.type if device.type == "cpu" else str(torch.cuda.get_device_name(device))


def measure_peak_memory(device: torch.device) -> int:
    """Device bytes on CUDA, else the largest resident set of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
