"""Laws that only a GPU can break, on a GPU: kernels, real children killed and resumed, real want of memory, the plan.

All but the last run on a CPU too (`slow` where children are started), so that their bodies are known to be sound; the
cases of CUDA carry the marker `gpu` and are skipped, with the reason, where torch sees no such device: `make gpu-test`.
"""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from cold import Cold
from test_levers import build_adapted, make_batch, make_related_examples, read_gradients
from test_resume import SHORT, after_steps, build_hungry_job, build_job, finish, inside_a_save, kill, train_warm
from test_training import make_examples, write_job
from tiny import make_recipe, write_base
from torch.nn import functional
from transformers import AutoConfig, LlamaForCausalLM

from appliance.cli.doctor import command
from appliance.evaluation.arms import Arm, Prompt
from appliance.evaluation.generation import generate_batch, load_arms
from appliance.model import load_template, render_row
from appliance.model.weights import Precision, compute_as_trained
from appliance.plan import build_plan, read_machine
from appliance.training import attention
from appliance.training.batches import build_records, collate_packed, spread_labels
from appliance.training.checkpoints import list_newest_first
from appliance.training.levers import Prefix, has_compiler
from appliance.training.rows import load_rows

HERE = "no CUDA device that torch sees"
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=HERE)], id="cuda"
)
CPU_IN_CHILDREN = pytest.param("cpu", marks=pytest.mark.slow, id="cpu")  # the same laws with forks are in test_resume


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device on which a test body runs in this process."""
    return torch.device(request.param)


@pytest.fixture(params=[CPU_IN_CHILDREN, CUDA])
def workers(request: pytest.FixtureRequest) -> Cold:
    """Children on each device."""
    return Cold(request.param)


HEADS = [(4, 4, 64), (6, 2, 64), (8, 1, 128), (4, 2, 256), (6, 2, 80), (4, 2, 200), (4, 2, 20), (2, 1, 264)]


@pytest.mark.parametrize("prefix", ["standard", "shared"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: "{}of{}x{}".format(*h))
def test_packed_attention_is_torchs_own_of_each_document(
    base: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int, int], prefix: Prefix
) -> None:
    """Outputs and gradients in bf16, whatever the heads; on CUDA by the varlen kernel wherever it takes them."""
    template, used = load_template(base), []
    rows = [render_row(e, template) for e in make_related_examples()]
    batch = move(collate_packed(build_records(rows), prefix=prefix), device)
    assert ("row_places" in batch) == (prefix == "shared")
    kernel = attention._attend_varlen
    monkeypatch.setattr(attention, "_attend_varlen", lambda *a, **k: used.append(1) or kernel(*a, **k))
    packed = draw_heads(*heads, tokens=batch["input_ids"].numel(), device=device)
    names = ("cu_seq_lens_q", "max_length_q", "row_places", "row_origins")
    found, _ = attention.attend(None, *packed, None, **{k: batch[k] for k in names if k in batch})
    assert bool(used) == (device.type == "cuda" and attention.has_varlen(packed[0]))

    exact = [x.detach().float().requires_grad_() for x in packed]
    expected = attend_apart(*exact, batch)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (found.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    check_close(found.float(), expected, tolerance=0.01)
    for ours, theirs in zip(packed, exact, strict=True):
        check_close(ours.grad.float(), theirs.grad, tolerance=0.02)


def draw_heads(heads: int, groups: int, width: int, *, tokens: int, device: torch.device) -> list[torch.Tensor]:
    """Queries, keys and values in bf16, (1, heads, tokens, width), that want gradients."""
    source = torch.Generator().manual_seed(7)
    shapes = [(1, n, tokens, width) for n in (heads, groups, groups)]
    return [torch.randn(s, generator=source).to(device, torch.bfloat16).requires_grad_() for s in shapes]


def attend_apart(query: Any, key: Any, value: Any, batch: dict[str, Any]) -> torch.Tensor:
    """One document after the other in fp32 by SDPA, (1, T, H, D), keys and values repeated for every head."""
    places = batch.get("row_places", torch.arange(query.shape[2], device=query.device))
    origins = batch.get("row_origins", places)
    groups = query.shape[1] // key.shape[1]
    queries = query.index_select(2, places)
    keys, values = (x.index_select(2, places).repeat_interleave(groups, 1) for x in (key, value))
    documents = [
        functional.scaled_dot_product_attention(*(x[:, :, a:b] for x in (queries, keys, values)), is_causal=True)
        for a, b in pairwise(batch["cu_seq_lens_q"].tolist())
    ]
    return torch.cat(documents, 2).transpose(1, 2).index_select(1, origins)


def check_close(found: torch.Tensor, expected: torch.Tensor, *, tolerance: float) -> None:
    """The error of all values together, as a share of their size."""
    error = (found - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error <= tolerance, f"{float(error):.4f} off, {tolerance} allowed"


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch's tensors on the device."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.03)])
def test_trls_chunked_head_is_the_head_on_labelled_positions(
    base: Path, device: torch.device, precision: Precision, tolerance: float
) -> None:
    """Loss and gradients of both, in each arithmetic of training."""
    from trl.trainer.utils import add_fused_lm_head

    if device.type == "cuda" and not has_compiler():
        pytest.skip("no C compiler or Python's headers: the product takes the labelled head here")
    model, batch = build_adapted(base).to(device), move(make_batch(base, make_examples(6)), device)
    with compute_as_trained(precision, device=device):
        loss, expected = read_gradients(model, batch)
        add_fused_lm_head(model.get_base_model())
        fused, found = read_gradients(model, {**spread_labels(batch), "fused_lm_head": True})
    assert fused == pytest.approx(loss, rel=tolerance)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        check_close(found[name].float(), gradient.float(), tolerance=tolerance)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_killed_run_resumes_to_the_same_bytes(workers: Cold, base: Path, tmp_path: Path, method: str) -> None:
    """Real children, SIGKILLed between two steps and inside a save: the adapter of a run that nothing disturbed."""
    whole = build_job(base, tmp_path / "whole", method, **SHORT)
    expected = finish(workers, whole)  # type: ignore[arg-type]
    summary = json.loads((whole.folder / "summary.json").read_bytes())
    assert (summary["device"] == "cpu") == (workers.device == "cpu")

    job = build_job(base, tmp_path / "killed", method, **SHORT)
    codes = [kill(workers, job, moment) for moment in (after_steps(4, 0.0), inside_a_save(0.01))]  # type: ignore[arg-type]
    assert codes == [-signal.SIGKILL] * 2
    assert list_newest_first(job.checkpoints), "there is something to resume from"
    assert finish(workers, job) == expected  # type: ignore[arg-type]


TWO = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")],
    id="cuda",
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [CPU_IN_CHILDREN, TWO])
def test_two_devices_end_in_the_same_bytes_killed_or_with_the_base_shared_out(
    base: Path, tmp_path: Path, kind: str
) -> None:
    """Sums over the ranks come in one order, and gathered layers have the bits of whole ones."""
    workers = Cold(kind, devices=2)
    job = build_job(base, tmp_path / "whole", "lora", **SHORT).model_copy(update={"devices": 2, "micro_batch": 4})
    write_job(job)
    expected = finish(workers, job)  # type: ignore[arg-type]
    for sharded in (False, True):
        other = tmp_path / str(sharded)
        build_job(base, other, "lora", **SHORT)
        again = job.model_copy(update={"folder": other, "adapter": other / "adapter", "sharded": sharded})
        write_job(again)
        assert kill(workers, again, after_steps(4, 0.0)) == -signal.SIGKILL  # type: ignore[arg-type]
        assert finish(workers, again) == expected  # type: ignore[arg-type]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [CPU_IN_CHILDREN, TWO])
def test_two_devices_that_share_out_full_training_end_in_its_bytes_killed_or_not(
    base: Path, tmp_path: Path, kind: str
) -> None:
    """Weights, gradients and moments in parts, in whole files: a run that was killed ends as one that was not."""
    workers, digests = Cold(kind, devices=2), []
    for name in ("through", "killed"):
        job = build_job(base, tmp_path / name, "full", **SHORT)
        job = job.model_copy(update={"devices": 2, "micro_batch": 4, "sharded": True})
        write_job(job)
        if name == "killed":
            assert kill(workers, job, after_steps(4, 0.0)) == -signal.SIGKILL  # type: ignore[arg-type]
        digests.append(finish(workers, job))  # type: ignore[arg-type]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", ["cpu", TWO])
def test_a_base_that_is_spread_answers_as_on_one_device(base: Path, kind: str) -> None:
    """Its layers lie on all that torch sees, and greedy answers do not change."""
    template = load_template(base)
    arm = Arm("zero_shot", base, None, is_prompted=False)
    prompts = [Prompt(e.id, arm.name, template.encode_prompt(e.prompt)) for e in make_examples(5)]
    answers = []
    for spread in (False, True):
        model = load_arms([arm], folder=base, precision="fp32", spread=spread)
        devices = {p.device for p in model.parameters()}
        assert len(devices) == (2 if spread and kind == "cuda" else 1)
        given = generate_batch(model, prompts, template=template, stop_ids=[257], max_new_tokens=6)
        answers.append([o.output for o in given])
    assert answers[0] == answers[1]


@pytest.mark.timeout(900)
def test_real_want_of_memory_halves_the_micro_batch(
    workers: Cold, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory between what 8 and 16 rows need: the allocator refuses, the run goes on with 8 and steps of 16."""
    peaks = {}
    for micro in (16, 8):
        whole = build_hungry_job(base, tmp_path / f"whole-{micro}").model_copy(update={"micro_batch": micro})
        write_job(whole)
        finish(workers, whole)  # type: ignore[arg-type]
        peaks[micro] = int((whole.folder / "peak").read_text())
    assert peaks[16] - peaks[8] > 32 << 20, "what the one needs more is more than noise"

    limit = (peaks[8] + peaks[16]) // 2
    job = build_hungry_job(base, tmp_path / "short")
    summary, said = train_warm(workers, job, monkeypatch, address_space=limit)  # type: ignore[arg-type]
    assert said == ["out of memory; again with micro-batch 8, the effective batch stays"]
    assert (summary["micro_batch"], summary["effective_batch"], summary["steps"]) == (8, 16, 3)


@pytest.mark.timeout(900)
def test_the_plan_tells_the_peak(workers: Cold, tmp_path: Path) -> None:
    """100 million weights: within a tenth on a GPU, its CUDA counted; on a CPU a layer of it, and a bound."""
    layers = 12 if workers.device == "cuda" else 1
    base = write_larger_base(tmp_path / "base", layers=layers)
    job = build_hungry_job(base, tmp_path / "job")
    rows = load_rows(job.folder / "train.rows.jsonl")
    recipe = make_recipe(training=job.training.model_dump() | {"packing": "auto", "epochs": 1 / 3, "warmup_ratio": 0.0})
    plan = build_plan(
        recipe,
        lengths=[len(r.input_ids) for r in rows],
        trained_tokens=sum(r.trained for r in rows),
        validation_rows=0,
        base=base,
        machine=read_machine(),
    )
    assert 8e6 * layers < plan.parameters < 10e6 * layers
    changes = {"micro_batch": plan.micro_batch, "checkpointing": plan.checkpointing, "training": recipe.training}
    job = job.model_copy(update=changes)
    write_job(job)
    finish(workers, job)  # type: ignore[arg-type]
    if workers.device == "cuda":
        measured = sum(int((job.folder / name).read_text()) for name in ("peak", "context"))
        assert plan.peak_bytes == pytest.approx(measured, rel=0.1)
    else:
        summary = json.loads((job.folder / "summary.json").read_bytes())
        assert summary["peak_memory_bytes"] < plan.peak_bytes < 3 * summary["peak_memory_bytes"]


def write_larger_base(folder: Path, *, layers: int) -> Path:
    """The tiny base with `layers` of the width of a small real model, 9 million weights each."""
    kept = (write_base(folder) / "generation_config.json").read_bytes()
    config = AutoConfig.from_pretrained(folder)
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": layers, "num_attention_heads": 12}
    for name, value in {**wide, "num_key_value_heads": 4, "head_dim": 64}.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(kept)
    return folder


@pytest.mark.parametrize("wanted", [CUDA])
def test_doctor_finds_the_gpu_that_is_there(tmp_path: Path, wanted: str) -> None:
    """And multiplies on it; the lines of other tools, which training does without, are `test_doctor`'s."""
    options = ["--gpu", "--json", "--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(command, options, standalone_mode=False)
    assert done.exception is None, done.output
    lines = {c["subject"]: c for c in json.loads(done.stdout)}
    assert lines["GPU"]["outcome"] != "fault", lines["GPU"]
    assert "torch sees it" in lines["GPU"]["found"]
    assert lines["torch"]["outcome"] != "fault", lines["torch"]
    assert f"multiplies on {wanted}" in lines["torch"]["found"]
