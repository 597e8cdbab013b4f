"""Loading weights in a child process: dtype, quantisation and attention in one place.

Imported only by the workers. Never passes `trust_remote_code`; safetensors only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from appliance.errors import LostDeviceError, ModelError
from appliance.model.faults import name_fault
from appliance.model.processor import has_cpu_bf16
from appliance.model.shapes import list_weight_files

_DRIVER = Path("/dev/nvidiactl")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
Precision = Literal["bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def select_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU.

    Raises `LostDeviceError` where the driver has a GPU that this torch cannot use: the plan was made for it, and
    days on a CPU instead are nobody's wish.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if torch.version.cuda and is_gpu_expected(_DRIVER, os.environ.get("CUDA_VISIBLE_DEVICES")):
        raise LostDeviceError(
            f"there is a GPU and torch {torch.__version__} does not see it ({_explain_cuda()}); look with `appliance "
            "doctor`: update the driver, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return torch.device("cpu")


def is_gpu_expected(driver: Path, visible: str | None) -> bool:
    """Whether NVIDIA's driver is loaded here (its control device is there) and nobody hid the GPUs."""
    return driver.exists() and (visible is None or visible.strip() not in ("", "-1"))


def _explain_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as fault:
        return str(fault).splitlines()[0]
    return "no device"


def select_precision(wanted: Literal["auto", "bf16", "fp32"], *, device: torch.device) -> Precision:
    """bf16 where the device computes in it (CUDA from Ampere on; CPUs with avx512_bf16 or AMX), else fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if has_cpu_bf16(Path("/proc/cpuinfo")) else "fp32"


def compute_as_trained(precision: Precision, *, device: torch.device) -> torch.autocast:
    """The trainer's arithmetic: autocast to bf16 whatever the weights are kept in, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def load_model(
    folder: Path,
    *,
    precision: Precision,
    device: torch.device,
    four_bit: bool = False,
    spread: bool = False,
    attention: str | None = None,
    dequantise: bool = False,
) -> Any:
    """The causal language model of `folder`, on `device`, or layer by layer over all that torch sees if `spread`.

    `attention` left out is the library's choice: torch's fused one for every class that it computes in full.
    Raises `ModelError` when it is damaged.
    """
    transformers_logging.disable_progress_bar()
    dtype = _DTYPES[precision]
    quantisation = _build_nf4(dtype) if four_bit else None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if dequantise:
            config.quantization_config["dequantize"] = True
        model, found = select_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention or ("eager" if caps_scores(config) else None),
            quantization_config=quantisation,
            device_map="balanced" if spread else {"": device} if four_bit else None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as fault:
        if name_fault(fault) != "other":
            raise
        first = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise ModelError(
            f"base model {folder}: cannot be loaded ({first}); delete the folder and fetch it again"
        ) from fault
    if absent := sorted(found["missing_keys"]):
        raise ModelError(
            f"base model {folder}: {len(absent)} weights are not in its files, the first is {absent[0]}; they would be "
            "random: fetch the model again"
        )
    if four_bit:
        _keep_layout(model)
    return model if four_bit or spread else model.to(device)


def caps_scores(config: Any) -> bool:
    """Whether attention caps its scores (Gemma 2): torch's fused one cannot, and transformers 5.17 takes it anyway."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def select_class(config: Any) -> Any:
    """The class that reads and writes text: transformers lists models with a tower for images in one of two places."""
    causal = type(config) in AutoModelForCausalLM._model_mapping  # noqa: SLF001 - its only list
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def strip_adapter(model: Any) -> Any:
    """The model that transformers made, without what PEFT put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_layers(model: Any) -> list[Any]:
    """The layers of a model, by what transformers itself splits it; empty where its class does not say."""
    names = model._no_split_modules or ()  # noqa: SLF001 - there is no other place that says it
    return [m for m in model.modules() if type(m).__name__ in names]


def _keep_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU.

    It does so at the first pass in evaluation mode, and its kernel for that layout has no gradient: every later
    training step would lose what flows through the base's layers. A save packs them back, with other scales: steps
    after it would not be those of a run that starts there (`Linear4bit`, bitsandbytes/nn/modules.py).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_finite(model: Any, folder: Path, *, four_bit: bool = False) -> None:
    """Raise `ModelError` that names the first weight with a NaN or an infinity.

    One pass for the least and the greatest value. 4-bit weights are read from the files of `folder`:
    quantisation turns a NaN into an ordinary number.
    """
    pairs = read_weights(folder) if four_bit else model.named_parameters()
    for name, weight in pairs:
        if weight.is_floating_point() and weight.numel():
            least, most = torch.aminmax(weight.detach())
            if not bool(torch.isfinite(least) & torch.isfinite(most)):
                raise ModelError(f"base model {folder}: {name} has values that are not finite; fetch the model again")


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of every weight in the files of `folder`, one at a time."""
    for file in list_weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                yield name, weights.get_tensor(name)


@contextmanager
def keeping_generation(model: Any, folder: Path) -> Iterator[None]:
    """While a whole model is saved to `folder`, its generation_config.json is written whatever its makers put in it.

    transformers loads sampling values without `do_sample`, as many models are published with, and refuses to write
    them where anything else was changed; servers take them. Nothing is done for a model with an adapter around it.
    """
    generation = model.generation_config
    if strip_adapter(model) is not model or _is_writable(generation):
        yield
        return
    model.generation_config = type(generation)()
    try:
        yield
    finally:
        model.generation_config = generation
    generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def _is_writable(generation: Any) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def copy_beside_weights(source: Path, folder: Path) -> None:
    """Put a model's tokenizer, chat template and whatever else lies there beside new weights in `folder`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)


def _build_nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation (arXiv 2305.14314, section 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
