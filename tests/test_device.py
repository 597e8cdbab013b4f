"""Laws of what only a GPU meets, held on a CPU: what decides there is asked here, the same operators run on "meta".

A tensor on torch's `meta` device has no values: whatever reads one back, as a GPU would have to be waited for, and
whatever is made on another device by oversight, raises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_levers import make_related_examples
from test_training import make_job, quiet, run_in_process
from tiny import make_recipe, write_base
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from appliance.command import WorkerEnd, run_worker
from appliance.digest import digest_folder
from appliance.errors import DeviceError, LostDeviceError, ModelError
from appliance.evaluation import GenerationJob, generate
from appliance.model import TokenRow, load_template, render_row
from appliance.model.faults import device_faults_as_errors, name_end, name_fault
from appliance.model.shapes import read_sizes, read_weight_shapes
from appliance.model.weights import is_gpu_expected, load_model, select_device
from appliance.plan import Machine, Plan, build_plan
from appliance.plan.activations import count_activations
from appliance.training import attention, levers, norms, train
from appliance.training.batches import build_records, collate_packed, collate_padded, count_row_tokens, spread_labels
from appliance.training.fingerprint import make_deterministic, settle_determinism
from appliance.training.fused import fuse_lora
from appliance.training.guards import find_packing_fault
from appliance.training.levers import Levers, settle_levers

ROW = TokenRow(id="r", input_ids=list(range(8)), spans=[(4, 8)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What makes this process deterministic is taken back."""
    cudnn, deterministic = torch.backends.cudnn, torch.utils.deterministic
    kept = cudnn.deterministic, cudnn.benchmark, deterministic.fill_uninitialized_memory
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    cudnn.deterministic, cudnn.benchmark, deterministic.fill_uninitialized_memory = kept
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def build_on_meta(base: Path) -> Any:
    """The tiny model with fused LoRA in bf16, without values."""
    attention.register()
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert fuse_lora(adapted)
    for norm in (m for m in adapted.modules() if isinstance(m, LlamaRMSNorm)):
        norm.forward = MethodType(norms._forward, norm)  # what has no values cannot be probed
    return adapted


@pytest.mark.parametrize("kernel", ["varlen", "sdpa"])
def test_a_packed_step_never_waits_for_the_device_and_makes_nothing_beside_it(
    base: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """Forward and backward of a packed micro-batch, with a shared prefix or none, by either kernel of a GPU."""
    monkeypatch.setattr(attention, "has_varlen", lambda _query: kernel == "varlen")
    template = load_template(base)
    records = build_records([render_row(e, template) for e in make_related_examples()])
    model = build_on_meta(base)
    for batch in (collate_packed(records), collate_packed(records, prefix="shared")):
        moved = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()}
        for inputs in (moved, {**(everywhere := spread_labels(moved)), "labels": everywhere["shift_labels"]}):
            count_row_tokens(inputs)
            model(**inputs, use_cache=False).loss.backward()
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


def test_counting_a_padded_batch_does_not_wait_for_the_device() -> None:
    """The device counts; who logs it reads it."""
    records = [{"input_ids": [1, 2, 3], "spans": [[1, 3]]}, {"input_ids": [1], "spans": [[0, 1]]}]
    batch = collate_padded(records, pad_id=0)
    assert int(count_row_tokens(batch)) == 4
    assert count_row_tokens({k: v.to("meta") for k, v in batch.items()}).is_meta


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_the_real_places_are_counted_as_they_would_be_found(lengths: list[int]) -> None:
    """Every document's tokens stand at the start of its own stretch of the padded batch."""
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest, tokens = max(lengths), sum(lengths)
    index, real = attention._spread_index(cumulative, longest, tokens=tokens)
    assert real.tolist() == [d * longest + i for d, length in enumerate(lengths) for i in range(length)]
    assert index[real].tolist() == list(range(tokens))
    assert (index == tokens).sum() == len(lengths) * longest - tokens


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "takes"),
    [
        (torch.bfloat16, 64, (8, 0), True),
        (torch.float16, 128, (9, 0), True),
        (torch.bfloat16, 256, (8, 9), True),
        (torch.bfloat16, 256, (12, 0), True),
        (torch.bfloat16, 224, (10, 0), True),
        (torch.float32, 64, (9, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
        (torch.bfloat16, 20, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 224, (8, 9), False),
        (torch.bfloat16, 200, (12, 1), False),
    ],
)
def test_the_flash_kernel_is_asked_only_for_what_it_has(
    dtype: torch.dtype, width: int, capability: tuple[int, int], *, takes: bool
) -> None:
    """Half precision, Ampere or newer, heads in eights up to 256, less where shared memory is small."""
    assert attention.takes_varlen(dtype, width, capability) is takes


def test_master_weights_under_autocast_are_attended_in_its_precision(base: Path) -> None:
    """Rotated queries and keys of fp32 weights are fp32, values are not: the kernel takes all three in bf16."""
    found: list[tuple[torch.dtype, torch.dtype]] = []

    def look(_module: Any, query: Any, key: Any, value: Any, *_arguments: Any, **_options: Any) -> Any:
        found.append((query.dtype, value.dtype))
        assert {attention.select_dtype(x) for x in (query, key, value)} == {torch.bfloat16}
        return query.transpose(1, 2), None

    AttentionInterface.register("looked_at", look)
    model = load_model(base, precision="fp32", device=torch.device("cpu"), attention="looked_at")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.tensor([ROW.input_ids]), use_cache=False)
    assert set(found) == {(torch.float32, torch.bfloat16)}
    assert attention.select_dtype(torch.ones(1)) == torch.float32


def test_the_guard_meets_the_kernel_that_trains(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full training in bf16: rows are compared under autocast, as they are trained."""
    attend, found = attention.attend, set()

    def look(module: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        found.add(attention.select_dtype(query))
        return attend(module, query, *arguments, **options)

    monkeypatch.setattr(attention, "attend", look)
    attention.register()
    model = load_model(base, precision="fp32", device=torch.device("cpu"), attention=attention.NAME)
    template = load_template(base)
    rows = tuple(render_row(e, template) for e in make_related_examples())
    assert not find_packing_fault(model, rows, prefix="shared", precision="bf16", device=torch.device("cpu"))
    monkeypatch.undo()
    attention.register()
    assert found == {torch.bfloat16}


@pytest.mark.usefixtures("restored")
def test_a_gpu_is_made_deterministic_strictly() -> None:
    """With warnings only, every fused attention keeps its unordered backward."""
    make_deterministic(torch.device("cuda", 0))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("restored")
def test_only_a_model_that_cannot_be_deterministic_is_let_off(base: Path) -> None:
    """Its operator is named; nothing of the question stays, neither gradients nor drawn numbers."""
    said: list[str] = []
    model = load_model(base, precision="fp32", device=torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(1)
    settle_determinism(model, ROW, precision="fp32", emit=lambda **event: said.append(event["note"]))
    assert (said, torch.is_deterministic_algorithms_warn_only_enabled()) == ([], False)

    place, one = torch.tensor([0]), torch.ones(1)
    model.model.norm.register_forward_hook(lambda *_: torch.rand(3).put_(place, one) and None)
    settle_determinism(model, ROW, precision="fp32", emit=lambda **event: said.append(event["note"]))
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert said == ["put_ is not deterministic here: a resumed run may end in other bits"]
    assert all(p.grad is None for p in model.parameters())
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("fault", [ValueError("no convolution has a prefix"), RuntimeError("CUDA out of memory")])
def test_what_a_model_does_not_take_is_left_to_the_guards_to_tell(base: Path, fault: Exception) -> None:
    """They name method and class; a want of memory is nobody's but the plan's, and goes on."""
    model = load_model(base, precision="fp32", device=torch.device("cpu"))
    torch.use_deterministic_algorithms(True)

    def refuse(*_: Any) -> None:
        raise fault

    model.model.norm.register_forward_hook(refuse)
    with nullcontext() if isinstance(fault, ValueError) else pytest.raises(RuntimeError, match="out of memory"):
        settle_determinism(model, ROW, precision="fp32", emit=lambda **_event: None)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.usefixtures("restored")
def test_a_strictly_deterministic_run_ends_in_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """No operator of a whole run is without such a form, and asking for it leaves no trace."""
    recipe = make_recipe(training={"precision": "fp32"})
    plain, strict = make_job(base, tmp_path / "plain", recipe), make_job(base, tmp_path / "strict", recipe)
    run_in_process(plain)
    torch.use_deterministic_algorithms(True)
    run_in_process(strict)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert digest_folder(strict.adapter) == digest_folder(plain.adapter)


def test_the_worst_step_is_computed_as_the_run_will_be(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast and with checkpointing where the run has them: else it wants memory that no step wants."""
    from appliance.training import trainer

    prove, found = trainer.prove_worst_step, []

    def look(live: Any, rows: Any, others: Any, *, micro_batch: int) -> None:
        compute = live.compute_loss

        def compute_and_look(model: Any, inputs: Any) -> Any:
            layers = [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]
            found.append((any(layers), torch.is_autocast_enabled("cpu")))
            return compute(model, inputs)

        live.compute_loss = compute_and_look
        prove(live, rows, others, micro_batch=micro_batch)
        live.compute_loss = compute

    monkeypatch.setattr(trainer, "prove_worst_step", look)
    recipe = make_recipe(method={"type": "full"}, training={"precision": "bf16"})
    job = make_job(base, tmp_path, recipe).model_copy(update={"checkpointing": True})
    run_in_process(job)
    assert found == [(True, True)] * 2


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be", 2), "memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "memory"),
        (MemoryError(), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure", 719), "lost"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered", 214), "lost"),
        (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable", 46), "lost"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered", 710), "other"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), "other"),
        (RuntimeError("expected scalar type Float but found BFloat16"), "other"),
    ],
)
def test_a_fault_of_the_device_is_told_from_one_of_the_program(fault: BaseException, kind: str) -> None:
    """Out of memory is tried with less, a lost device later, a bug never."""
    assert name_fault(fault) == kind
    raised = {"memory": DeviceError, "lost": LostDeviceError, "other": type(fault)}[kind]
    with pytest.raises(raised) as caught, device_faults_as_errors():
        raise fault
    assert type(caught.value) is raised


def test_a_base_too_large_for_the_device_is_not_called_damaged(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to delete a model because a GPU is small."""

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(base, precision="fp32", device=torch.device("cpu"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: int("no number"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(base, precision="fp32", device=torch.device("cpu"))


def test_a_lost_device_is_not_answered_with_a_smaller_micro_batch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is that of a device fault, the advice to go on elsewhere."""
    from appliance.training import launch

    tried: list[int] = []

    def fail(job: Any, **_rest: object) -> WorkerEnd:
        tried.append(job.micro_batch)
        return WorkerEnd(LostDeviceError.exit_code, "CUDA error: unspecified launch failure")

    monkeypatch.setattr(launch, "_run_child", fail)
    with pytest.raises(DeviceError, match="the device failed: CUDA error: unspecified launch failure") as caught:
        train(make_job(base, tmp_path), note=quiet)
    assert (tried, caught.value.exit_code) == ([8], 34)


@pytest.mark.parametrize(
    ("code", "words"), [(34, "out of memory with one row at a time: few"), (35, "the device failed: few")]
)
def test_an_evaluation_without_its_device_is_a_device_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    """Exit code 34, as in training: the answers so far are kept and the same command goes on."""
    from appliance.evaluation import generate as module

    monkeypatch.setattr(sys.modules[module.__module__], "run_worker", lambda *_, **__: WorkerEnd(code, "few"))
    job = GenerationJob(folder=tmp_path, arms=(), stop_ids=(0,), max_new_tokens=1, batch=1, precision="fp32")
    with pytest.raises(DeviceError, match=words) as caught:
        generate(job, (), note=quiet)
    assert caught.value.exit_code == 34


def test_an_evaluation_out_of_memory_goes_on_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the rows at a time, for every arm from its first row; the next start begins with what fitted."""
    module, said = sys.modules[generate.__module__], []
    tried: list[int] = []

    def run(*_arguments: object, **_options: object) -> WorkerEnd:
        tried.append(json.loads((tmp_path / "job.json").read_bytes())["batch"])
        assert not (tmp_path / "outputs.jsonl").exists(), "answers in larger batches are not mixed in"
        (tmp_path / "outputs.jsonl").touch()
        return WorkerEnd(DeviceError.exit_code if tried[-1] > least else 0, "few")

    monkeypatch.setattr(module, "run_worker", run)
    job = GenerationJob(folder=tmp_path, arms=(), stop_ids=(0,), max_new_tokens=1, batch=32, precision="fp32")
    least = 8
    assert generate(job, (), note=said.append) == ()
    assert tried == [32, 16, 8]
    assert said == [f"out of memory; every arm answers again, in batches of {n}" for n in (16, 8)]
    tried.clear()
    (tmp_path / "outputs.jsonl").unlink()
    generate(job, (), note=quiet)
    assert tried == [8]
    least, changed = 0, job.model_copy(update={"max_new_tokens": 2})
    tried.clear()
    with pytest.raises(DeviceError, match="out of memory with one row at a time: few"):
        generate(changed, (), note=quiet)
    assert tried == [32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("Error out of memory at line 93 in file /src/csrc/ops.cu", 34),
        ("Error unspecified launch failure at line 93 in file /src/csrc/ops.cu", LostDeviceError.exit_code),
        ("Error invalid device function at line 93 in file /src/csrc/ops.cu", 1),
        ("ValueError: a text that says out of memory", 1),
    ],
)
def test_a_library_that_ends_the_process_says_why_in_the_log(tmp_path: Path, last: str, code: int) -> None:
    """In bitsandbytes nothing is raised: it prints and exits with 1. It counts as what it says."""
    argv = [sys.executable, "-c", f"import sys; sys.exit({last!r})"]
    end = name_end(run_worker(argv, log=tmp_path / "log", on_event=lambda _event: None))
    assert end.code == code
    assert last in end.failure


def test_doctor_starts_the_device_as_a_run_does() -> None:
    """With the allocator that the children ask for: where a device does not have it, the probe says so, not the run."""
    code = "import os, appliance.plan.probe; print(os.environ['PYTORCH_ALLOC_CONF'])"
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_")}
    said = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["expandable_segments:True"]


def test_a_child_asks_torch_for_segments_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch is loaded, and only where nobody has chosen an allocator's settings, by either name."""
    code = (
        "import os; from appliance.child import run_child; "
        "run_child(lambda stop, emit: emit(conf=os.environ.get('PYTORCH_ALLOC_CONF')))"
    )

    def ask(**environment: str) -> str:
        own = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_")}
        argv = [sys.executable, "-c", code]
        return subprocess.run(argv, env=own | environment, capture_output=True, text=True, check=True).stdout

    assert "expandable_segments:True" in ask()
    assert "max_split_size_mb:64" in ask(PYTORCH_ALLOC_CONF="max_split_size_mb:64")
    assert "null" in ask(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver without a device that torch sees is refused; hidden GPUs and no driver are a CPU's case."""
    from appliance.model import weights

    driver = tmp_path / "nvidiactl"
    assert not is_gpu_expected(driver, None)
    driver.touch()
    assert [is_gpu_expected(driver, v) for v in (None, "0", "GPU-1", "", "-1")] == [True, True, True, False, False]
    monkeypatch.setattr(weights, "_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert select_device().type == "cpu", "a torch without CUDA was chosen for the CPU"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(LostDeviceError, match="does not see it"):
        select_device()


def test_the_fused_head_needs_what_builds_its_kernel(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU host without a compiler scores labelled positions plainly; a CPU's fused head is torch's own code."""
    wanted = Levers(
        rows="packed",
        attention="packed",
        head="fused",
        lora="fused",
        norm="fused",
        prefix="shared",
        compile=False,
    )
    model = load_model(base, precision="fp32", device=torch.device("cpu"), attention=attention.NAME)
    on_gpu = SimpleNamespace(modules=model.modules, config=model.config, device=torch.device("cuda", 0))
    monkeypatch.setattr(levers, "has_compiler", lambda: True)
    assert settle_levers(wanted, on_gpu).head == "fused"
    monkeypatch.setattr(levers, "has_compiler", lambda: False)
    assert settle_levers(wanted, on_gpu).head == "labelled"
    assert settle_levers(wanted, model).head == "fused"


def test_a_compiler_is_a_program_and_pythons_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either alone builds nothing."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(levers.sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    assert levers.has_compiler()
    (tmp_path / "Python.h").unlink()
    assert not levers.has_compiler()
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not levers.has_compiler()


def test_a_gpu_without_bf16_is_planned_in_fp32(base: Path) -> None:
    """Twice the bytes of the frozen base and of the activations, as `auto` and `fp32` train there."""

    def plan(precision: str, *, has_bf16: bool) -> Plan:
        machine = Machine(cores=2, memory_bytes=1, gpu="a GPU", gpu_memory_bytes=16 << 30, has_bf16=has_bf16)
        recipe = make_recipe(training={"precision": precision, "max_length": 1000})
        return build_plan(recipe, lengths=[1000] * 60, trained_tokens=9, validation_rows=0, base=base, machine=machine)

    wide, narrow = plan("auto", has_bf16=False), plan("auto", has_bf16=True)
    assert plan("fp32", has_bf16=True) == wide
    assert wide.micro_batch == narrow.micro_batch
    sizes, weights = read_sizes(base), read_weight_shapes(base)
    activations = [count_activations("fused", sizes, weights, width=w, fused_norms=True) for w in (4.0, 2.0)]
    in_fp32, in_bf16 = (a.estimate(wide.micro_batch * 1000, checkpointing=False) for a in activations)
    held = wide.parameters * 2 + in_fp32 - in_bf16
    assert wide.peak_bytes - narrow.peak_bytes == pytest.approx(1.02 * held, rel=1e-3)
