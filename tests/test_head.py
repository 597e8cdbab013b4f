"""Laws of the LM head's loss: transformers' loss and gradients, without its memory."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forgetting import count_live_bytes
from test_levers import build_adapted, make_batch, make_related_examples, read_gradients
from test_silent_failures import build_architecture
from test_training import make_examples, make_job, run_in_process
from tiny import make_recipe, write_base
from transformers.loss.loss_utils import ForCausalLMLoss

from appliance.errors import TrainingError
from appliance.model import load_template, render_row
from appliance.training import attention, guards, head
from appliance.training.batches import build_records, collate_padded, drop_places
from appliance.training.head import lighten_loss, scoring_only, sum_entropies


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def draw_logits(rows: int, vocabulary: int, *, spread: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are trained, and a target for each row."""
    torch.manual_seed(rows)
    logits = (spread * torch.randn(rows, vocabulary)).to(dtype)
    return logits.requires_grad_(), torch.randint(vocabulary, (rows,))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(2, 70),
    values=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1.0, 30.0, 3e4]),
)
def test_it_is_the_loss_of_torch_however_rows_are_taken(rows: int, vocabulary: int, values: int, spread: float) -> None:
    """One row at a time, a few with fewer at last, all at once; logits of any size."""
    logits, targets = draw_logits(rows, vocabulary, spread=spread, dtype=torch.float32)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected / 7, logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_VALUES", values)
        found = sum_entropies(logits, targets)
        (gradient,) = torch.autograd.grad(found / 7, logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_gradient_in_bf16_is_rounded_once() -> None:
    """As transformers', which is made in fp32: not a bit apart but where the last of fp32 decides."""
    logits, targets = draw_logits(50, 3000, spread=3.0, dtype=torch.bfloat16)
    ours = head._find_loss(logits, targets, 3000, shift_labels=targets[None], num_items_in_batch=50)
    theirs = ForCausalLMLoss(logits, targets, 3000, shift_labels=targets[None], num_items_in_batch=50)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    found, wanted = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    assert (found != wanted).float().mean() < 1e-3
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(wrong: float) -> None:
    """A run that diverged is stopped for it."""
    logits, targets = draw_logits(3, 11, spread=1.0, dtype=torch.float32)
    with torch.no_grad():
        logits[1, 4] = wrong
    assert not math.isfinite(float(sum_entropies(logits, targets).detach()))


@pytest.mark.parametrize(("dtype", "bytes_a_logit"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_step_holds_the_gradients_of_the_logits_and_no_more(dtype: torch.dtype, bytes_a_logit: int) -> None:
    """What the plan counts beside the logits (`plan.memory.measure_logit`); the library's own takes more."""
    logits, targets = draw_logits(600, 8000, spread=1.0, dtype=dtype)

    def step(loss: Any) -> Any:
        return torch.autograd.grad(loss(logits, targets, 8000, shift_labels=targets[None]), logits)

    ours = count_live_bytes(lambda: step(head._find_loss))
    assert ours <= bytes_a_logit * logits.numel() + 1.5 * 4 * head._VALUES
    assert count_live_bytes(lambda: step(ForCausalLMLoss)) > 2 * ours


def test_a_model_with_it_has_the_loss_and_the_gradients_it_had(base: Path) -> None:
    """In training it gives no logits, which nobody reads and accelerate would cast; asked for answers, it does."""
    model, batch = build_adapted(base), make_batch(base, make_examples(6))
    model.train()
    loss, expected = read_gradients(model, batch)
    lighten_loss(model)
    light, found = read_gradients(model, batch)
    assert light == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert model(**batch, use_cache=False).logits is None
    assert model.eval()(**batch, use_cache=False).logits is not None


def test_rows_in_a_rectangle_keep_the_librarys_loss() -> None:
    """Where positions were not chosen, labels are shifted and some are ignored."""
    logits, _ = draw_logits(12, 30, spread=1.0, dtype=torch.float32)
    labels = torch.tensor([[-100, 1, 2, 3, -100, -100]] * 2)
    found, wanted = (loss(logits.view(2, 6, 30), labels, 30) for loss in (head._find_loss, ForCausalLMLoss))
    assert float(found) == float(wanted)


def test_a_model_with_a_loss_of_its_own_keeps_it(base: Path) -> None:
    """Only the loss that this one equals is replaced."""
    model = build_adapted(base)
    own = model.get_base_model().loss_function = lambda *_arguments, **_options: torch.zeros(())
    lighten_loss(model)
    assert model.get_base_model().loss_function is own


def make_padded(base: Path, *, last: str | None = None) -> dict[str, Any]:
    """A padded batch of rows of differing lengths and turns."""
    template = load_template(base)
    talk = [*make_examples(4, last=last), *make_related_examples()]
    return collate_padded(build_records([render_row(e, template) for e in talk]), pad_id=257)


@pytest.mark.parametrize("method", ["lora", "prompt-tuning", "prefix-tuning"])
def test_of_padded_rows_the_head_scores_what_is_trained(base: Path, tmp_path: Path, method: str) -> None:
    """The loss and the gradients of all positions, also behind virtual tokens and in the few rows at a time."""
    job = make_job(base, tmp_path, make_recipe(method={"type": method}))
    model = tiny.build_adapted(job)
    attention.use_standard(model)
    batch = make_padded(base)
    loss, expected = read_gradients(model, drop_places(batch))
    for lightened in (False, True):
        if lightened:
            lighten_loss(model)
        with scoring_only(model, batch) as chosen:
            found_loss, found = read_gradients(model, chosen)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    again, _ = read_gradients(model, drop_places(batch))
    assert again == pytest.approx(loss, rel=1e-6), "outside of it the head is as it was"


def test_a_class_whose_head_cannot_choose_keeps_its_own(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are made past the head's module: found on two rows, before any step."""
    model = build_adapted(base)
    attention.use_standard(model)
    template = load_template(base)
    rows = [render_row(e, template) for e in make_examples(3)]
    probe = partial(guards.can_choose, model, rows, precision="fp32", device=torch.device("cpu"))
    assert probe()
    inner = model.get_base_model()
    with monkeypatch.context() as patch:
        patch.setattr(inner, "get_output_embeddings", lambda: torch.nn.Linear(1, 1))
        assert not probe()
    assert probe()


def test_a_padded_step_holds_the_logits_of_what_is_trained(base: Path) -> None:
    """With a large vocabulary the prompts' would be the largest thing in memory."""
    model = build_architecture(base, "Qwen2", vocab_size=40_000)
    attention.use_standard(model)
    lighten_loss(model)
    batch = make_padded(base)
    trained = batch["shift_labels"].numel()
    assert trained < 0.2 * batch["input_ids"].numel()

    def step() -> None:
        with scoring_only(model, batch) as chosen:
            model(**chosen, use_cache=False).loss.backward()

    assert count_live_bytes(step) < 3 * 4 * trained * 40_000 + 2 * sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "head"), [("Cohere", "fused"), ("Gemma2", "fused"), ("Llama4Text", "labelled")])
def test_the_fused_head_knows_what_a_class_does_to_its_logits_or_is_left_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, head: str
) -> None:
    """Scaled, capped, or the class hides its body: the losses of the labelled head, whichever is taken."""
    from appliance.training import trainer

    folder = shutil.copytree(base, tmp_path / "base")
    build_architecture(base, name).save_pretrained(folder)
    shutil.copy(base / "generation_config.json", folder)
    recipe = make_recipe(training={"precision": "fp32", "epochs": 1})
    plain = run_in_process(make_job(folder, tmp_path / "plain", recipe))
    select = trainer.select_levers
    monkeypatch.setattr(trainer, "select_levers", lambda *a, **o: replace(select(*a, **o), head="fused"))
    summary = run_in_process(make_job(folder, tmp_path / "as-on-a-gpu", recipe))
    assert summary["levers"]["head"] == head
    assert summary["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-4)
    assert summary["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-3)
    insisting = make_recipe(training={"precision": "fp32", "epochs": 1, "speed": {"head": "fused"}})
    if head == "labelled":
        with pytest.raises(TrainingError, match=r"training\.speed\.head: .*set it to auto"):
            run_in_process(make_job(folder, tmp_path / "insisting", insisting))
