"""Laws of the speed levers: they change how numbers are computed, never which numbers."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_plan import save_with_vision
from test_training import make_examples, make_job, run_in_process
from tiny import build_adapted as build_job_model
from tiny import make_recipe, make_stop, write_base

from appliance.errors import InterruptedRunError, TrainingError
from appliance.example import Example, Message
from appliance.model import load_template, render_row
from appliance.model.weights import load_model
from appliance.recipe import Recipe
from appliance.training import attention
from appliance.training.batches import (
    Sizes,
    build_records,
    collate_packed,
    count_computed_tokens,
    count_row_tokens,
    round_up,
    spread_labels,
)
from appliance.training.fused import fuse_lora
from appliance.training.guards import _change_others
from appliance.training.levers import Prefix, select_levers, settle_levers
from appliance.training.methods import compile_layers
from appliance.training.norms import fuse_norms
from appliance.training.trainer import run_job


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def build_adapted(base: Path, **options: Any) -> Any:
    """The tiny model in fp32 with LoRA whose two factors are both random, so that its effect is large."""
    attention.register()
    model = load_model(base, precision="fp32", device=torch.device("cpu"), attention=attention.NAME)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    torch.manual_seed(3)
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


def make_batch(base: Path, examples: list[Example]) -> dict[str, Any]:
    """A packed batch of rows of differing lengths."""
    template = load_template(base)
    return collate_packed(build_records([render_row(e, template) for e in examples]))


def read_loss(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss alone."""
    return float(model(**batch, use_cache=False).loss.detach()), {}


def read_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradient of every trained weight."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_fused_lora_has_the_loss_and_the_gradients_of_peft(base: Path) -> None:
    """Forward and backward of the fused layers are PEFT's, weight by weight."""
    model, batch = build_adapted(base), make_batch(base, make_examples(6))
    loss, expected = read_gradients(model, batch)
    assert fuse_lora(model) == 14, "seven linear layers in each of two decoder layers"
    fused_loss, found = read_gradients(model, batch)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_fused_lora_computes_in_the_precision_that_autocast_asks_for(base: Path) -> None:
    """A base in fp32 under autocast to bf16 is PEFT's sum in bf16, not half of each."""
    model, batch = build_adapted(base), make_batch(base, make_examples(6))
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = read_gradients(model, batch)
        fuse_lora(model)
        fused_loss, found = read_gradients(model, batch)
    assert (fused_loss, found.keys()) == (loss, expected.keys())
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_fused_lora_still_switches_off(base: Path) -> None:
    """With the adapter disabled a fused layer is the base layer, as the check of an adapter's effect needs."""
    model, batch = build_adapted(base), make_batch(base, make_examples(3))
    fuse_lora(model)
    with torch.no_grad(), model.disable_adapter():
        off = float(model(**batch, use_cache=False).loss)
    with torch.no_grad():
        on = float(model(**batch, use_cache=False).loss)
    plain = load_model(base, precision="fp32", device=torch.device("cpu"), attention=attention.NAME)
    with torch.no_grad():
        alone = float(plain(**batch, use_cache=False).loss)
    assert off == pytest.approx(alone, rel=1e-6)
    assert on != pytest.approx(off, rel=1e-3)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "dora"])
def test_layers_that_are_not_the_plain_sum_keep_pefts_forward(base: Path, options: dict[str, Any]) -> None:
    """Dropout and DoRA are left alone."""
    assert fuse_lora(build_adapted(base, **options)) == 0


def test_all_heads_give_one_loss(base: Path) -> None:
    """Scoring labelled positions, every position, or through TRL's fused head: the same loss and gradients."""
    from trl.trainer.utils import add_fused_lm_head

    model, batch = build_adapted(base), make_batch(base, make_examples(6))
    loss, expected = read_gradients(model, batch)
    add_fused_lm_head(model.get_base_model())
    everywhere = spread_labels(batch)
    assert int((everywhere["shift_labels"] != -100).sum()) == batch["shift_labels"].numel()
    heads = {"fused": {**everywhere, "fused_lm_head": True}, "standard": {**everywhere, "labels": batch["input_ids"]}}
    for name, inputs in heads.items():
        other, found = read_gradients(model, inputs)
        assert other == pytest.approx(loss, rel=1e-5), name
        for weight, gradient in expected.items():
            torch.testing.assert_close(found[weight], gradient, rtol=1e-3, atol=1e-6)


def test_grouped_heads_attend_as_repeated_heads(base: Path) -> None:
    """The plain product shares a key head within its group; torch's own kernel with repeated heads agrees."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 7, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    ours = attention._attend_plain(query, key, value, 0.3, window=None)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_a_fused_layer_gives_may_be_added_to_in_place(base: Path) -> None:
    """As Llama 4 adds its experts to the layer that all tokens share."""
    model = build_adapted(base)
    fuse_lora(model)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 3, layer.in_features)
    (expected,) = torch.autograd.grad(layer(x).add(1.0).square().sum(), layer.lora_B["default"].weight)
    (found,) = torch.autograd.grad(layer(x).add_(1.0).square().sum(), layer.lora_B["default"].weight)
    torch.testing.assert_close(found, expected)


def make_related_examples() -> list[Example]:
    """Rows that begin alike in every way: one system prompt, one first turn, one whole prompt, nothing at all."""
    system, turn = Message("system", "Name the colour of the thing."), Message("user", "a red thing")
    talk = (system, turn, Message("assistant", "red"))
    rows = [
        talk,
        (system, Message("user", "a green thing"), Message("assistant", "green")),
        (*talk, Message("user", "and now?"), Message("assistant", "blue")),
        (*talk[:2], Message("assistant", "crimson")),
        talk,
        (Message("user", "a red thing"), Message("assistant", "red")),
    ]
    return [Example(f"r{i}", messages, provenance="program") for i, messages in enumerate(rows)]


def test_the_guard_changes_other_rows_and_no_size(base: Path) -> None:
    """What rows begin with alike stays, so that sums keep their order; behind it they have other tokens."""
    template = load_template(base)
    records = build_records([render_row(e, template) for e in make_related_examples()[1:]])
    changed = _change_others(records)
    before, after = (collate_packed(r, prefix="shared") for r in (records, changed))
    assert changed[-1] == records[-1]
    assert all(old["input_ids"] != new["input_ids"] for old, new in zip(records[:-1], changed[:-1], strict=True))
    assert before["input_ids"].shape == after["input_ids"].shape
    for key in ("row_places", "row_origins", "cu_seq_lens_q", "logits_to_keep"):
        assert torch.equal(before[key], after[key]), key


def check_same_step(model: Any, batch: dict[str, Any], other: dict[str, Any]) -> None:
    """Two batches of the same rows have one loss and one gradient."""
    loss, expected = read_gradients(model, batch)
    other_loss, found = read_gradients(model, other)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_prefix_computed_once_has_the_loss_and_the_gradients_of_every_row_by_itself(base: Path) -> None:
    """Rows that share system prompts, turns or everything: fewer positions, the same loss and gradients."""
    template = load_template(base)
    records = build_records([render_row(e, template) for e in make_related_examples()])
    apart, together = collate_packed(records), collate_packed(records, prefix="shared")
    assert together["input_ids"].numel() < 0.6 * apart["input_ids"].numel()
    check_same_step(build_adapted(base), apart, together)


@pytest.mark.parametrize("prefix", ["standard", "shared"])
def test_what_rounds_up_a_batch_changes_neither_loss_nor_gradients(base: Path, prefix: Prefix) -> None:
    """Positions that no row holds: nothing sees them, and they are not counted."""
    template = load_template(base)
    records = build_records([render_row(e, template) for e in make_related_examples()])
    exact, rounded = (collate_packed(records, prefix=prefix, sizes=s) for s in ("exact", "rounded"))
    assert rounded["input_ids"].numel() == round_up(exact["input_ids"].numel()) > exact["input_ids"].numel()
    assert count_row_tokens(rounded) == count_row_tokens(exact) == sum(len(r["input_ids"]) for r in records)
    assert count_computed_tokens(rounded) == exact["input_ids"].numel()
    check_same_step(build_adapted(base), exact, rounded)


@given(st.integers(1, 1 << 20))
def test_sizes_are_few_and_little_is_added(size: int) -> None:
    """Never less, at most a sixteenth more, and sixteen sizes between a power of two and the next."""
    rounded = round_up(size)
    assert size <= rounded <= size * 17 / 16
    assert rounded == round_up(rounded)
    assert rounded & ((1 << max(0, rounded.bit_length() - 5)) - 1) == 0


def test_every_kernel_gives_each_row_its_own_copy_of_the_prefix(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused causal kernel and one over rows end to end, as CUDA has, agree with the plain product."""
    template = load_template(base)
    records = build_records([render_row(e, template) for e in make_related_examples()])
    model, batch = build_adapted(base), collate_packed(records, prefix="shared")
    loss, expected = read_gradients(model, batch)

    def attend_row_by_row(
        query: Any, key: Any, value: Any, *, cumulative: Any, longest: int, scale: float, window: None
    ) -> Any:
        ends = cumulative.tolist()
        assert window is None
        assert longest == max(b - a for a, b in pairwise(ends))
        rows = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (query, key, value)), is_causal=True, scale=scale, enable_gqa=True
            )
            for a, b in pairwise(ends)
        ]
        return torch.cat(rows, 2).transpose(1, 2)

    for name, changes in (
        ("sdpa", {"_PLAIN_LIMIT": 0}),
        ("varlen", {"has_varlen": lambda _query: True, "_attend_varlen": attend_row_by_row}),
    ):
        with monkeypatch.context() as patch:
            for key, value in changes.items():
                patch.setattr(attention, key, value)
            other, found = read_gradients(model, batch)
        assert other == pytest.approx(loss, rel=1e-5), name
        for weight, gradient in expected.items():
            torch.testing.assert_close(found[weight], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("release", ["old", "new"])
def test_the_kernel_of_rows_end_to_end_gets_grouped_heads_as_they_are(
    monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """No copy of a key for each query head, whether this release of torch wants to be told of groups or not."""
    given: list[tuple[int, dict[str, Any]]] = []

    def old(q: Any, k: Any, v: Any, *rest: Any, scale: float, window_size: tuple[int, int]) -> Any:
        assert k.shape == v.shape
        given.append((k.shape[1], {"window_size": window_size}))
        return q

    def new(*arguments: Any, window_size: tuple[int, int], enable_gqa: bool = False, **options: Any) -> Any:
        assert enable_gqa
        return old(*arguments, window_size=window_size, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", {"old": old, "new": new}[release])
    query, key = torch.randn(1, 6, 5, 8), torch.randn(1, 2, 5, 8)
    ends = torch.tensor([0, 2, 5])
    mixed = attention._attend_varlen(query, key, key, cumulative=ends, longest=3, scale=1.0, window=None)
    assert mixed.shape == (1, 5, 6, 8)
    assert given == [(2, {"window_size": (-1, 0)})]


@pytest.mark.parametrize(("shared", "is_shared"), [(10, False), (49, False), (50, True), (200, True)])
def test_where_copying_rows_costs_more_nothing_is_shared(shared: int, is_shared: bool) -> None:
    """Two rows of 250 tokens and a least saving of a tenth of them: below it the batch is the one of rows apart."""
    records = [{"input_ids": [1] * shared + [2 + i] * (250 - shared), "spans": [[shared + 1, 250]]} for i in range(2)]
    apart = collate_packed(records, prefix="standard")
    batch = collate_packed(records, prefix="shared", least=0.1)
    assert ("row_places" in batch) == is_shared
    assert batch["input_ids"].numel() == 500 - shared * is_shared
    assert is_shared or all(torch.equal(torch.as_tensor(batch[k]), torch.as_tensor(v)) for k, v in apart.items())
    assert "row_places" in collate_packed(records, prefix="shared")


TOKENS = st.lists(st.integers(0, 2), min_size=2, max_size=8)


@given(
    st.lists(st.tuples(TOKENS, st.lists(st.integers(0, 2), min_size=1, max_size=3)), min_size=1, max_size=6),
    st.sampled_from(["exact", "rounded"]),
)
def test_a_shared_batch_spells_every_row(rows: list[tuple[list[int], list[int]]], sizes: Sizes) -> None:
    """Whatever rows share: each can be read back, position by position, and trains what it trained alone."""
    records = [{"input_ids": p + a, "spans": [[len(p), len(p) + len(a)]]} for p, a in rows]
    batch = collate_packed(records, prefix="shared", sizes=sizes)
    ids, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    places = batch.get("row_places", torch.arange(len(ids))).tolist()
    origins = batch.get("row_origins", torch.arange(len(ids))).tolist()
    ends = batch["cu_seq_lens_q"].tolist()
    kept, targets = batch["logits_to_keep"].tolist(), batch["shift_labels"][0].tolist()
    for record, (start, end) in zip(records, pairwise(ends), strict=True):
        row = places[start:end]
        assert [ids[i] for i in row] == record["input_ids"]
        assert [positions[i] for i in row] == list(range(end - start))
        for i in range(*record["spans"][0]):
            assert (kept.pop(0), targets.pop(0)) == (row[i - 1], record["input_ids"][i])
    assert not kept
    held = max(places) + 1
    assert [places[i] for i in origins[:held]] == list(range(held)), "each position has one row that computes it"
    assert origins[held:] == [0] * ((round_up(held) if sizes == "rounded" else held) - held)
    assert len(set(batch["logits_to_keep"].tolist())) == len(batch["logits_to_keep"]), "a label of its own for each"


def test_nothing_is_shared_where_rows_draw_their_own_noise(base: Path) -> None:
    """Dropout, in the adapter or in the base, is drawn once per row: then prefixes are computed for each."""
    recipe = make_recipe()
    levers = select_levers(recipe.training, method=recipe.method, on_cuda=False)
    plain, noisy = build_adapted(base), build_adapted(base, lora_dropout=0.1)
    assert settle_levers(levers, plain).prefix == "shared"
    assert settle_levers(levers, noisy).prefix == "standard"
    plain.config.attention_dropout = 0.1
    assert settle_levers(levers, plain).prefix == "standard"


@pytest.mark.parametrize(("key", "value"), [("attention_dropout", 0.1), ("output_router_logits", True)])
def test_nothing_is_shared_where_the_text_part_of_a_model_says_so(
    base: Path, tmp_path: Path, key: str, value: object
) -> None:
    """A class that reads images too has a configuration for its text inside the outer one."""
    attention.register()
    folder = save_with_vision(shutil.copytree(base, tmp_path / "base"), "Gemma3")
    model = load_model(folder, precision="fp32", device=torch.device("cpu"), attention=attention.NAME)
    recipe = make_recipe()
    levers = select_levers(recipe.training, method=recipe.method, on_cuda=False)
    assert settle_levers(levers, model).prefix == "shared"
    setattr(model.config.get_text_config(), key, value)
    assert settle_levers(levers, model).prefix == "standard"


def test_the_worst_step_shares_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that proves the memory is the largest there can be, though these rows have a prefix in common."""
    from appliance.training import trainer

    prove, sizes = trainer.prove_worst_step, []

    def watch_proof(live: Any, rows: Any, others: Any, *, micro_batch: int) -> None:
        compute = live.compute_loss
        live.compute_loss = lambda model, inputs: sizes.append(inputs["input_ids"].numel()) or compute(model, inputs)
        prove(live, rows, others, micro_batch=micro_batch)
        live.compute_loss = compute
        longest = sorted((len(r.input_ids) for r in rows), reverse=True)[:micro_batch]
        assert sizes[-1] == sum(longest)
        assert max(sizes) == sizes[-1]

    monkeypatch.setattr(trainer, "prove_worst_step", watch_proof)
    summary = run_in_process(make_job(base, tmp_path))
    assert sizes
    assert summary["tokens_computed"] < summary["tokens"], "the rows do share something"


SPEEDS: list[dict[str, str]] = [
    {"attention": "standard", "head": "standard", "lora": "standard"},
    {"head": "fused"},
    {"prefix": "standard"},
    {"norm": "standard"},
]


@pytest.mark.parametrize("speed", SPEEDS, ids=["standard", "fused-head", "prefixes-apart", "own-norms"])
def test_a_run_learns_the_same_whatever_its_levers(base: Path, tmp_path: Path, speed: dict[str, str]) -> None:
    """Every lever set to the libraries' own way gives the losses of the fast way, and the summary says which it was."""
    fast = run_in_process(make_job(base, tmp_path / "fast", make_recipe(training={"precision": "fp32"})))
    slow = run_in_process(
        make_job(base, tmp_path / "slow", make_recipe(training={"precision": "fp32", "speed": speed}))
    )
    assert fast["levers"] == {
        "rows": "packed",
        "attention": "packed",
        "head": "fused" if torch.cuda.is_available() else "labelled",
        "lora": "fused",
        "norm": "fused",
        "prefix": "shared",
        "compile": False,
    }
    assert {k: slow["levers"][k] for k in speed} == speed
    assert slow["first_loss"] == pytest.approx(fast["first_loss"], rel=1e-4)
    assert slow["last_loss"] == pytest.approx(fast["last_loss"], rel=0.05)


def test_compilation_takes_every_layer(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a class calls its list of them; one that does not say what they are is refused."""
    from appliance.training import methods

    recipe = make_recipe(training={"speed": {"compile": "on"}})
    model = build_job_model(make_job(base, tmp_path, recipe))
    methods.compile_layers(model)
    assert [m._compiled_call_impl is not None for m in methods.find_layers(model.get_base_model())] == [True, True]
    monkeypatch.setattr(methods, "find_layers", lambda _model: [])
    with pytest.raises(TrainingError, match=r"training\.speed\.compile: LlamaForCausalLM does not say .*off"):
        methods.compile_layers(model)


def use_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable-length attention of torch, whose operator gets a kernel for a CPU."""
    from torch.nn.attention import varlen

    def attend(query: Any, key: Any, value: Any, ends: Any, *rest: Any) -> Any:
        _, _, _, _, scale, *_ = rest
        rows = [tuple(x[a:b].transpose(0, 1)[None] for x in (query, key, value)) for a, b in pairwise(ends.tolist())]
        mixed = [
            torch.nn.functional.scaled_dot_product_attention(*r, is_causal=True, scale=scale, enable_gqa=True)
            for r in rows
        ]
        norms, seed = torch.empty(query.shape[1], query.shape[0]), torch.empty(2, dtype=torch.uint64)
        return torch.cat(mixed, 2)[0].transpose(0, 1), norms, seed

    varlen._varlen_attn.register_kernel("cpu", attend)
    monkeypatch.setattr(attention, "has_varlen", lambda _query: True)


@pytest.mark.parametrize(
    ("kernel", "prefix"),
    [("plain", "shared"), ("sdpa", "shared"), ("varlen", "standard"), ("varlen", "shared")],
)
def test_a_compiled_layer_serves_batches_of_any_size(
    base: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, prefix: Prefix
) -> None:
    """No graph is for one size alone, or each step would compile; none breaks. The first layer has its own."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    if kernel == "varlen":
        use_varlen(monkeypatch)
    if kernel == "sdpa":
        monkeypatch.setattr(attention, "_PLAIN_LIMIT", 0)
    template = load_template(base)
    records = build_records([render_row(e, template) for e in make_related_examples()])
    batches = [collate_packed(records[first:], prefix=prefix) for first in (0, 2, 1)]
    assert len({b["input_ids"].numel() for b in batches}) == len({b["cu_seq_lens_q"].numel() for b in batches}) == 3
    model = build_adapted(base)
    fuse_lora(model)
    fuse_norms(model)
    read = read_loss if kernel == "varlen" else read_gradients  # torch has no backward of it for a CPU
    wanted = [read(model, b) for b in batches]
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compiled(self, backend="eager", **o))
    reset()
    counters.clear()
    compile_layers(model)
    for batch, (loss, gradients) in zip(batches, wanted, strict=True):
        found, computed = read(model, batch)
        assert found == pytest.approx(loss, rel=1e-5)
        assert computed.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(computed[name], gradient, rtol=1e-3, atol=1e-6), name
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    reset()


def use_compiler(monkeypatch: pytest.MonkeyPatch, *, keeps: float) -> None:
    """In the place of torch's, one that gives the right outputs and keeps so much of each layer's gradients."""

    def build(module: Any, _inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            outputs = module(*values)
            for output in outputs:
                if torch.is_tensor(output) and output.requires_grad:
                    output.register_hook(lambda gradient: gradient * keeps)
            return outputs

        return run

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compiled(self, backend=build, **o))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_that_are_compiled_to_other_gradients_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The losses are right, and a run would end with an adapter of something else: torch 2.11 made zeros of them."""
    from torch._dynamo import reset

    use_compiler(monkeypatch, keeps=0.5)
    reset()
    job = make_job(base, tmp_path, make_recipe(training={"precision": precision, "speed": {"compile": "on"}}))
    with pytest.raises(TrainingError, match=r"training\.speed\.compile: torch .*\(off by [4-9]\d%\); set it to off"):
        run_job(job, stop=make_stop(), emit=lambda **_event: None)
    reset()


@pytest.mark.parametrize("keeps", [0.0, 1.0])
def test_noise_is_not_taken_for_a_compilers_fault(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: float
) -> None:
    """With dropout each pass has gradients of its own: layers that lose theirs are refused, no others."""
    from torch._dynamo import reset

    use_compiler(monkeypatch, keeps=keeps)
    reset()
    recipe = make_recipe(method={"type": "lora", "rank": 4, "dropout": 0.9}, training={"speed": {"compile": "on"}})
    job = make_job(base, tmp_path, recipe)

    def stop() -> None:
        raise InterruptedRunError("before the first step")

    refused = pytest.raises(TrainingError, match=r"\(off by (9\d|100)%\); set it to off")
    with refused if keeps == 0 else pytest.raises(InterruptedRunError, match="before the first step"):
        run_job(job, stop=SimpleNamespace(defer=stop), emit=lambda **_event: None)  # type: ignore[arg-type]
    reset()


def test_guards_leave_the_compiler_its_ways_to_call_a_layer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step layers are compiled for that step and a validation, no more."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compiled(self, backend="eager", **o))
    reset()
    counters.clear()
    speed = {"compile": "on", "prefix": "standard"}  # else a CPU rounds sizes up, and has another way for those it did
    job = make_job(base, tmp_path, make_recipe(training={"precision": "bf16", "speed": speed}))

    def stop() -> None:
        raise InterruptedRunError("before the first step")

    with pytest.raises(InterruptedRunError, match="before the first step"):
        run_job(job, stop=SimpleNamespace(defer=stop), emit=lambda **_event: None)  # type: ignore[arg-type]
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    reset()


def test_levers_follow_device_and_method() -> None:
    """CUDA never holds the logits; padded batches and 4-bit layers keep the libraries' own ways."""

    def select(recipe: Recipe, *, on_cuda: bool) -> dict[str, object]:
        return select_levers(recipe.training, method=recipe.method, on_cuda=on_cuda).to_json()

    assert select(make_recipe(), on_cuda=True)["head"] == "fused"
    assert select(make_recipe(training={"packing": False}), on_cuda=True) == {
        "rows": "padded",
        "attention": "standard",
        "head": "labelled",
        "lora": "fused",
        "norm": "fused",
        "prefix": "standard",
        "compile": False,
    }
    assert select(make_recipe(method={"type": "qlora"}), on_cuda=False)["lora"] == "standard"
