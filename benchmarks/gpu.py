"""Training speed and memory on a GPU: TRL as it comes, TRL as an expert sets it, and the appliance.

One command, no network and no weights: models of the Llama 3 family's shapes with random weights,
rows of a small Markov chain with lengths as chats have them. Each contender runs in a process of its
own. It prints and writes JSON (`benchmarks/results/gpu-<device>.json`): real tokens a second, MFU, peak
memory, the plan's predicted peak beside the measured one, and the loss on rows that nobody trained on.

Every contender of a job starts from the same weights, base and adapter, drawn in bf16 from one seed, and
trains the same rows once in the same order (packing makes its own). `loss_parity` is `ok`, or says what is
wrong with the loss on the unseen rows: it did not begin where the appliance's did, it did not fall by `FALL`
nats, or after equal real tokens it is further from the appliance's than `PARITY` of what that one fell. Then
the command ends with exit code 1.

    python benchmarks/gpu.py                       # everything, about 35 minutes on one 80 GB GPU
    python benchmarks/gpu.py --only 8b-lora        # one job; the others' figures stay in the JSON
    python benchmarks/gpu.py --tiny                # the same code on a CPU in a few minutes: a test of this file

It needs torch and transformers, trl, peft, bitsandbytes and datasets, and what the product imports. On a machine
without network that has torch and transformers carry these wheels (a test holds the list to what packages ask for):

    accelerate annotated-types attrs bitsandbytes boto3 botocore click datasets dill jmespath jsonschema
    jsonschema-specifications markdown-it-py mdurl msgspec multiprocess pandas peft psutil pyarrow pydantic
    pydantic-core pygments python-dateutil referencing rich rpds-py s3transfer six trl typing-inspection urllib3
    xxhash

and for the tests that need a GPU, `make gpu-test PYTHON=python3`: hypothesis iniconfig pluggy pytest pytest-timeout
sortedcontainers.

MFU is the product's own (`appliance.training.utilisation`): 6 FLOPs a parameter of matrix products and
token for full training, 4 for LoRA, over the device's dense bf16 peak: from its table, else the rate
of a large bf16 product measured here (the JSON says which).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a bare checkout, nothing installed

import torch

from appliance.model.shapes import read_sizes
from appliance.training.utilisation import PEAK_FLOPS, count_flops, count_matrices

RESULTS = Path(__file__).parent / "results"
SEQUENCE, WARM_UP = 4096, 3
VOCABULARY = 128_256
BATCH, SEED = 8, 17
STATES, LIKELY = 32, 0.8  # of the chain: each state has two that may follow, one of them this likely
UNSEEN = 16
FALL, PARITY, SAME_START = 0.5, 0.1, 0.02  # nats; a share of the appliance's fall; nats
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "heads": 4,
        "groups": 2,
        "tied": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "heads": 32,
        "groups": 8,
        "tied": True,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "heads": 24,
        "groups": 8,
        "tied": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "heads": 32,
        "groups": 8,
        "tied": False,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "heads": 64,
        "groups": 8,
        "tied": False,
    },
}
JOBS: dict[str, dict[str, Any]] = {
    "1b-lora": {"shape": "1b", "method": "lora", "steps": 24},
    "3b-lora": {"shape": "3b", "method": "lora", "steps": 24},
    "8b-lora": {"shape": "8b", "method": "lora", "steps": 24},
    "8b-qlora": {"shape": "8b", "method": "qlora", "steps": 24},
    "1b-full": {"shape": "1b", "method": "full", "steps": 24},
    "70b-qlora": {"shape": "70b", "method": "qlora", "steps": 10, "contenders": ("appliance",), "tokens": 1024},
}
RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 2e-4}
TINY = {"shape": "tiny", "steps": 40, "tokens": 256, "rate": 1e-2}
CONTENDERS = {
    "trl": "SFTTrainer with its defaults: padded, fp32 weights under bf16 autocast, checkpointing",
    "trl-best": "SFTTrainer, bf16 weights, best-fit packing, no checkpointing, fused AdamW",
    "appliance": "as `appliance train` does it, every lever at auto",
    "appliance-compiled": "the same with `speed.compile: on`",
}


def main() -> None:
    """Run the jobs, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=JOBS, default=[])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on whatever device there is")
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="SECONDS", help="of one contender (default 900)"
    )
    parser.add_argument("--out", type=Path, help="the JSON; jobs in it of the same device and versions are kept")
    parser.add_argument("--run", nargs=2, metavar=("JOB", "CONTENDER"), help=argparse.SUPPRESS)
    parser.add_argument("--others", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(*options.run, is_tiny=options.tiny, others=options.others)))
        return
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("no CUDA device here; run it on a GPU, or with --tiny to try the code")
    target = options.out or (None if options.tiny else name_results())  # a tiny run is no result
    results = read_results(target)
    asked = options.only or list(JOBS)
    for job in asked:
        results["jobs"][job] = {}
        for contender in JOBS[job].get("contenders", CONTENDERS):
            figure = run_contender(job, contender, is_tiny=options.tiny, timeout_s=options.timeout, target=target)
            results["jobs"][job][contender] = figure
            print(describe_figure(job, contender, figure), flush=True)
        results["jobs"][job] = judge_parity(results["jobs"][job])
        write_results(results, target)
    measured = {job: results["jobs"][job] for job in asked}
    print_ratios(measured)
    if faults := list_parity_faults(measured):
        raise SystemExit("\n".join(faults))


def run_contender(job: str, contender: str, *, is_tiny: bool, timeout_s: float, target: Path | None) -> dict[str, Any]:
    """One figure from a process of its own; a failure is a figure too, and all that it said lies beside the JSON."""
    argv = [sys.executable, __file__, "--run", job, contender, "--others", str(measure_used())]
    argv += ["--tiny"] if is_tiny else []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            done = subprocess.run(
                argv,
                check=False,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                timeout=timeout_s,
                env=build_environment(),
            )
        except subprocess.TimeoutExpired:
            why = f"no end after {timeout_s:g} s"
        else:
            if done.returncode == 0:
                figure: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
                return figure
            why = ""
        said.seek(0)
        return tell_failure(
            said.read(), why=why, log=target and target.with_name(f"{target.stem}-{job}-{contender}.log")
        )


def tell_failure(said: str, *, why: str, log: Path | None) -> dict[str, Any]:
    """The last line of what a contender said, where it gives no other reason; and the file with all of it."""
    failed = {"failed": why or (said.strip().splitlines() or ["?"])[-1][-300:]}
    if log is None:
        sys.stderr.write(said)
        return failed
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(said, "utf-8")
    return {**failed, "log": log.name}


def build_environment() -> dict[str, str]:
    """One device, which TRL insists on in one process, and for every contender the allocator of the product's child."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": first, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def describe_figure(job: str, contender: str, figure: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in figure:
        log = f" (all of it in {figure['log']})" if "log" in figure else ""
        return f"{job:<10} {contender:<18} failed: {figure['failed']}{log}"
    mfu = f"{figure['mfu']:6.1%}" if figure["mfu"] is not None else "     -"
    predicted = f", predicted {figure['predicted_gib']:.1f}" if figure.get("predicted_gib") else ""
    return (
        f"{job:<10} {contender:<18} {figure['tokens_per_second']:9.0f} tokens/s  MFU {mfu}  "
        f"peak {figure['peak_gib']:6.2f} GiB{predicted}  "
        f"unseen loss {figure['unseen_loss_before']:.3f} to {figure['unseen_loss']:.3f}"
    )


def judge_parity(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of one job, each with its `loss_parity`; what failed has no loss to judge."""
    ours = figures.get("appliance", {"failed": "not run"})
    return {n: f if "failed" in f else {**f, "loss_parity": compare_losses(f, ours)} for n, f in figures.items()}


def compare_losses(figure: dict[str, Any], ours: dict[str, Any]) -> str:
    """`ok`, or in words how a contender's loss on the unseen rows is not what it has to be, beside the appliance's."""
    before, after = figure["unseen_loss_before"], figure["unseen_loss"]
    if not before - after >= FALL:
        return f"learned nothing: {before:.3f} before and {after:.3f} after, {FALL} less wanted"
    if "failed" in ours:
        return "ok"
    if not abs(before - ours["unseen_loss_before"]) <= SAME_START:
        return f"begins at {before:.3f}, the appliance at {ours['unseen_loss_before']:.3f}: not the same weights"
    allowed = PARITY * (ours["unseen_loss_before"] - ours["unseen_loss"])
    off = after - ours["unseen_loss"]
    return "ok" if abs(off) <= allowed else f"off the appliance's by {off:+.3f}, {allowed:.3f} allowed"


def list_parity_faults(jobs: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each contender whose loss is not what it has to be."""
    found = [(j, n, f.get("loss_parity", "ok")) for j, figures in jobs.items() for n, f in figures.items()]
    return [f"{job}: {name}: loss on unseen rows: {words}" for job, name, words in found if words != "ok"]


def print_ratios(jobs: dict[str, dict[str, Any]]) -> None:
    """The appliance's tokens/s over each peer's."""
    for job, figures in jobs.items():
        ours = figures.get("appliance", {}).get("tokens_per_second")
        peers = {n: f["tokens_per_second"] for n, f in figures.items() if n != "appliance" and "failed" not in f}
        if ours and peers:
            print(f"{job:<10} " + "  ".join(f"{ours / rate:.2f} x {name}" for name, rate in peers.items()))


def name_results() -> Path:
    """The committed result of this device."""
    return RESULTS / f"gpu-{describe_machine()['device'].replace(' ', '-').lower()}.json"


def read_results(target: Path | None) -> dict[str, Any]:
    """What calls of single jobs have measured on the same device with the same packages; what differs is left."""
    here = describe_machine()
    found = json.loads(target.read_bytes()) if target and target.exists() else {}
    is_same = all(found.get(key) == here[key] for key in ("device", "versions"))
    return {**here, "jobs": found["jobs"] if is_same else {}}


def write_results(results: dict[str, Any], target: Path | None) -> None:
    """After every job, so that a broken run leaves what it has."""
    if target is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def describe_machine() -> dict[str, Any]:
    """Date, device and versions."""
    found = {}
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "-"
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": device, "versions": found}


# --- what every contender trains ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """A contender after its run: when each step ended and its training loss, the model, the loss before the run."""

    steps: list[tuple[float, float]]
    model: Any
    unseen_loss_before: float
    predicted_gib: float | None = None


def measure(job: str, contender: str, *, is_tiny: bool, others: int = 0) -> dict[str, Any]:
    """Train the rows once in this process and measure; `others` held so many bytes of the device before."""
    spec = {"tokens": SEQUENCE, "rate": RATES[JOBS[job]["method"]], **JOBS[job], **(TINY if is_tiny else {})}
    vocabulary = 512 if is_tiny else VOCABULARY
    longest = 2 * spec["tokens"] // 9  # so that a batch of rows has as many tokens as a packed one
    rows = build_rows(spec["tokens"] * spec["steps"], longest=longest, vocabulary=vocabulary, seed=SEED)
    unseen = build_rows(UNSEEN * longest // 2, longest=longest, vocabulary=vocabulary, seed=SEED + 1)
    with tempfile.TemporaryDirectory() as folder:
        home = write_base(Path(folder) / "base", SHAPES[spec["shape"]], vocabulary=vocabulary)
        run = measure_trl if contender.startswith("trl") else measure_appliance
        trained = run(contender, spec, rows, unseen, home)
        peak = peak_bytes(others)
        matrices = count_matrices(read_shapes(home), read_sizes(home))
    losses = {"unseen_loss_before": trained.unseen_loss_before, "unseen_loss": score(trained.model, unseen)}
    return {
        **summarise(trained, spec, rows, matrices=matrices),
        **{name: round(loss, 4) for name, loss in losses.items()},
        "peak_gib": round(peak / 2**30, 3),
    }


def build_rows(tokens: int, *, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Rows of one Markov chain, whatever the seed; lengths vary eightfold and half of each row is trained.

    The chain's entropy is half a nat a token. Who has learned which tokens there are, and not which
    follows which, is at ln 32; who has learned nothing, above ln V.
    """
    states = random.Random(SEED).sample(range(3, vocabulary), STATES)
    after = [random.Random(f"{SEED} {s}").sample(states, 2) for s in range(STATES)]
    follow = dict(zip(states, after, strict=True))
    source, rows, total = random.Random(seed), [], 0
    while total < tokens:
        row = [source.choice(states)]
        for _ in range(source.randint(longest // 8, longest) - 1):
            likely, other = follow[row[-1]]
            row.append(likely if source.random() < LIKELY else other)
        rows.append(row)
        total += len(row)
    return rows


def score(model: Any, rows: list[list[int]]) -> float:
    """The mean loss of a trained token over `rows`, one row at a time, in the same arithmetic for every contender."""
    device, was_training, losses = model.device, model.training, []
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):  # no second copy
        for row in rows:
            half, ids = len(row) // 2, torch.tensor([row], device=device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(row) - half + 1).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[0, half:], reduction="none"))
    model.train(was_training)
    return float(torch.cat(losses).mean())


def write_base(folder: Path, shape: dict[str, Any], *, vocabulary: int) -> Path:
    """Config and a tokenizer without words: what the trainers read beside the weights."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    build_config(shape, vocabulary=vocabulary).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    return folder


def build_config(shape: dict[str, Any], *, vocabulary: int) -> Any:
    """A Llama config of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
    )


def start_model(
    home: Path, unseen: list[list[int]], *, dtype: torch.dtype, four_bit: bool, attention: str
) -> tuple[Any, float]:
    """The model before its run, and its loss on the unseen rows; what that took is not counted into the peak."""
    model = build_weights(home, dtype=dtype, four_bit=four_bit, attention=attention)
    before = score(model, unseen)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model, before


def build_weights(folder: Path, *, dtype: torch.dtype, four_bit: bool, attention: str) -> Any:
    """The model of `folder`'s config on the device, its weights drawn one by one: none exists there twice.

    Drawn in bf16, which every `dtype` holds exactly; rounded to 4 bits where that is asked for, so that 70B never
    exists in more.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if four_bit:
        fill_four_bit(model, dtype=dtype, device=device)
    model.tie_weights()
    names = dict(model.named_parameters(remove_duplicate=True))
    for name in [n for n, p in names.items() if p.is_meta]:
        parent, _, child = name.rpartition(".")
        values = draw(name, names[name].shape, device=device).to(dtype)
        setattr(model.get_submodule(parent), child, torch.nn.Parameter(values))
    model.tie_weights()
    with device:  # what is no weight was made on "meta" too; the argument for it came and went with versions
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


def draw(name: str, shape: torch.Size, *, device: torch.device) -> torch.Tensor:
    """A weight's first values in bf16, a function of its name: norms about one, matrices that keep a unit's size."""
    source = torch.Generator(device).manual_seed(crc32(f"{SEED} {name}".encode()))
    noise = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=source)
    return 1.0 + 0.02 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5


def fill_four_bit(model: Any, *, dtype: torch.dtype, device: torch.device) -> None:
    """Every linear layer but the head as NF4, doubly quantised, one at a time."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=dtype,
            device="meta",
        )
        values = draw(f"{name}.weight", module.weight.shape, device=device).to(dtype)
        layer.weight = bnb.nn.Params4bit(
            values, requires_grad=False, compress_statistics=True, quant_type="nf4", quant_storage=dtype
        ).to(device)
        layer.support_avx512bf16_for_cpu = False  # repacked at the first score, it would have no gradient
        del values
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model.is_loaded_in_4bit = True
    model.is_quantized = True  # the trainer asks then whether this kind of quantisation can be trained
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    model.quantization_method = settings.quant_method


@torch.no_grad()
def start_adapter(model: Any) -> Any:
    """The same first adapter for everyone: PEFT draws it from a generator that each contender leaves elsewhere."""
    for name, weight in model.named_parameters():
        if ".lora_A." in name:
            weight.copy_(draw(name, weight.shape, device=weight.device))
    return model


# --- the contenders ----------------------------------------------------------------------------


def measure_trl(
    contender: str, spec: dict[str, Any], rows: list[list[int]], unseen: list[list[int]], home: Path
) -> Trained:
    """TRL on pre-tokenised rows with a completion mask."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    is_best, method = contender == "trl-best", spec["method"]
    dtype = torch.bfloat16 if is_best and method != "full" else torch.float32
    model, before = start_model(
        home,
        unseen,
        dtype=torch.bfloat16 if method == "qlora" else dtype,
        four_bit=method == "qlora",
        attention="sdpa",
    )
    steps: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_arguments: Any, **_rest: Any) -> None:
            wait_for_device()
            steps.append((time.monotonic(), float("nan")))

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_rest: Any) -> None:
            if "loss" in logs and steps:
                steps[-1] = (steps[-1][0], logs["loss"])

    best: dict[str, Any] = {
        "packing": True,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "per_device_train_batch_size": 1,
    }
    if method == "qlora" and is_best:
        best |= {"optim": "paged_adamw_8bit", "gradient_checkpointing": True}
    options = best if is_best else {"per_device_train_batch_size": BATCH}
    half = [len(r) // 2 for r in rows]
    data = {
        "input_ids": rows,
        "completion_mask": [[0] * h + [1] * (len(r) - h) for r, h in zip(rows, half, strict=True)],
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(home.parent / "out"),
            num_train_epochs=1,
            completion_only_loss=True,  # else a completion mask is ignored without a word
            max_length=spec["tokens"],
            learning_rate=spec["rate"],
            seed=SEED,
            data_seed=SEED,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **options,
        ),
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(home),
        peft_config=None
        if method == "full"
        else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    start_adapter(trainer.model)
    trainer.train()
    return Trained(steps, trainer.model, before)


def measure_appliance(
    contender: str, spec: dict[str, Any], rows: list[list[int]], unseen: list[list[int]], home: Path
) -> Trained:
    """The product's own training child in this process; only where the first weights come from is replaced."""
    from types import SimpleNamespace

    import msgspec

    from appliance.model import TokenRow
    from appliance.plan import read_machine
    from appliance.recipe import Recipe
    from appliance.training import TrainingJob, methods, trainer

    folder = home.parent / "job"
    folder.mkdir()
    token_rows = [TokenRow(id=f"r{i}", input_ids=r, spans=[(len(r) // 2, len(r))]) for i, r in enumerate(rows)]
    (folder / "train.rows.jsonl").write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in token_rows))
    (folder / "validation.rows.jsonl").write_bytes(b"")
    method: dict[str, Any] = {"type": spec["method"]}
    if spec["method"] != "full":
        method |= {"rank": 16, "alpha": 32}
    training = {
        "epochs": 1,
        "effective_batch": BATCH,
        "max_length": spec["tokens"],
        "learning_rate": spec["rate"],
        "schedule": "linear",
        "warmup_ratio": 0.0,
        "seed": SEED,
        "checkpoints": 1,
        "speed": {"compile": "on" if contender == "appliance-compiled" else "off"},
    }
    values = {
        "name": "bench",
        "base": {"model": "./base"},
        "dataset": {"path": "d"},
        "method": method,
        "training": training,
    }
    recipe = Recipe.model_validate(values)
    shapes = read_shapes(home)
    machine = read_machine()
    if torch.cuda.is_available() and not machine.gpu:  # a rented machine without nvidia-smi
        device = torch.cuda.get_device_properties(0)
        machine = replace(machine, gpu=device.name, gpu_memory_bytes=device.total_memory, has_bf16=True, gpus=1)
    plan = plan_bench(recipe, token_rows, home, shapes=shapes, machine=machine)

    started: list[tuple[Any, float]] = []

    def load_model(base: Path, *, precision: str, four_bit: bool = False, attention: str = "sdpa", **_: Any) -> Any:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model, before = start_model(base, unseen, dtype=dtype, four_bit=four_bit, attention=attention)
        started.append((model, before))
        return model

    def build_model(*arguments: Any, **options: Any) -> Any:
        model = start_adapter(methods.build_model(*arguments, **options))
        started[0] = (model, started[0][1])
        return model

    job = TrainingJob(
        folder=folder,
        adapter=folder / "adapter",
        base=home,
        base_name="random",
        method=recipe.method,
        training=recipe.training,
        micro_batch=plan.micro_batch,
        checkpointing=plan.checkpointing,
        threads=machine.cores,
        fingerprint={},
    )
    steps: list[tuple[float, float]] = []

    def emit(**event: Any) -> None:
        if "step" in event:
            wait_for_device()
            steps.append((time.monotonic(), event["loss"]))

    with patch.object(methods, "load_model", load_model), patch.object(trainer, "build_model", build_model):
        trainer.run_job(job, stop=SimpleNamespace(is_set=False, defer=lambda: None), emit=emit)
    ((model, before),) = started
    return Trained(steps, model, before, plan.peak_bytes / 2**30)


def wait_for_device() -> None:
    """Until what was asked of a GPU is done: before a look at the clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plan_bench(recipe: Any, rows: list[Any], home: Path, *, shapes: dict[str, tuple[int, ...]], machine: Any) -> Any:
    """The product's plan over shapes that no file holds."""
    from appliance.plan import plan as planning

    with patch.object(planning, "read_weight_shapes", lambda _base: shapes):
        return planning.build_plan(
            recipe,
            lengths=[len(r.input_ids) for r in rows],
            trained_tokens=sum(r.trained for r in rows),
            validation_rows=0,
            base=home,
            machine=machine,
        )


def read_shapes(home: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, from the config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home))
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


# --- figures -----------------------------------------------------------------------------------


def summarise(trained: Trained, spec: dict[str, Any], rows: list[list[int]], *, matrices: int | None) -> dict[str, Any]:
    """Rate over the steps after the warm-up, every step weighing the same share of the tokens; training losses."""
    steps, predicted = trained.steps, trained.predicted_gib
    tokens = sum(len(r) for r in rows)
    first = min(WARM_UP, len(steps) - 2)
    seconds = steps[-1][0] - steps[first][0]
    rate = tokens * (len(steps) - 1 - first) / len(steps) / seconds
    cost = None if matrices is None else count_flops(matrices, method=spec["method"])
    peak, source = find_peak()
    return {
        "tokens_per_second": round(rate, 1),
        "mfu": None if peak is None or cost is None else round(rate * cost / peak, 4),
        "peak_flops": peak,
        "peak_flops_source": source,
        "predicted_gib": None if predicted is None else round(predicted, 3),
        "first_loss": round(steps[0][1], 4),
        "last_loss": round(statistics.mean(loss for _, loss in steps[-3:]), 4),
        "steps": len(steps),
        "real_tokens": tokens,
    }


def find_peak() -> tuple[float | None, str]:
    """The device's dense bf16 peak in FLOP/s: from the table, else measured; none on a CPU."""
    if not torch.cuda.is_available():
        return None, "none"
    name = torch.cuda.get_device_name(0)
    if name in PEAK_FLOPS:
        return PEAK_FLOPS[name], "table"
    size = 8192
    left = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    for _ in range(3):
        left @ left
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(10):
        left @ left
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.monotonic() - began), "measured"


def measure_used() -> int:
    """Bytes of the device that are in use by anyone, this process's CUDA among them."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info(0)
    return int(total - free)


def peak_bytes(others: int) -> int:
    """What the plan predicts: device bytes reserved at the peak and CUDA's own; the resident set on a CPU."""
    if torch.cuda.is_available():
        own = measure_used() - others - torch.cuda.memory_reserved()
        return int(torch.cuda.max_memory_reserved()) + max(0, int(own))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
