"""The ways in which training fails without a word, one test a way: each is built for real, and each is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_evaluation import make_job as make_generation_job
from test_forgetting import count_live_bytes
from test_training import make_examples, make_job, run_in_process
from tiny import TEMPLATE, build_adapted, make_recipe, write_base, write_tokenizer

from appliance.errors import ApplianceError, EvaluationError, ModelError, TrainingError
from appliance.evaluation import generate
from appliance.example import Example, Message
from appliance.model import TokenRow, load_template
from appliance.model.weights import Precision
from appliance.recipe import Recipe
from appliance.training import TrainingJob, build_rows, describe_rows, prepare_rows
from appliance.training.levers import Prefix, select_levers
from appliance.training.rows import load_rows

TURNS = ("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two")
CHAT = Example("r1", tuple(Message(r, c) for r, c in TURNS), provenance="human")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model, sound."""
    return write_base(tmp_path_factory.mktemp("base"))


def refuse_training(job: TrainingJob, *, message: str, kind: type[ApplianceError] = TrainingError) -> None:
    """The job is refused before its first step, and leaves no adapter."""
    with pytest.raises(kind, match=message):
        run_in_process(job)
    assert not (job.folder / "metrics.jsonl").exists(), "no step was taken"
    assert not job.adapter.exists()


def refuse_rows(folder: Path, template: str, *, message: str) -> None:
    """A template is refused when rows are made, and no rows are written."""
    write_tokenizer(folder, template=template)
    with pytest.raises(TrainingError, match=message):
        prepare_rows([CHAT], template=load_template(folder), max_length=256, file=folder / "rows")
    assert not (folder / "rows").exists()


@pytest.mark.parametrize(
    "spans", [[(0, 20)], [], [(5, 5)], [(9, 12), (3, 6)], [(3, 10**6)]], ids=["all", "none", "empty", "back", "beyond"]
)
def test_training_on_the_users_text_is_refused(base: Path, tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    """A mask that covers the prompt, nothing, or what is not there never reaches a step, whoever wrote the rows."""
    file = tmp_path / "train.rows.jsonl"
    ids = load_template(base).encode_prompt(CHAT.prompt)[:20]
    file.write_bytes(msgspec.json.encode(TokenRow("r1", ids, spans)) + b"\n")
    with pytest.raises(TrainingError, match=r"row r1: .* tokens would be trained"):
        load_rows(file)


def test_rows_with_a_wrong_mask_stop_the_child(base: Path, tmp_path: Path) -> None:
    """The training child looks at every mask again before it loads a weight."""
    job = make_job(base, tmp_path)
    rows = load_rows(tmp_path / "train.rows.jsonl")
    broken = [msgspec.structs.replace(rows[0], spans=[(0, len(rows[0].input_ids))]), *rows[1:]]
    (tmp_path / "train.rows.jsonl").write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in broken))
    refuse_training(job, message="row r0: .* tokens would be trained")


def test_a_template_that_marks_only_some_turns_still_trains_all_or_is_refused(tmp_path: Path) -> None:
    """Trained spans are as many as assistant turns, and decoded they are the contents; a swallowed turn is refused."""
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    write_tokenizer(tmp_path / "marked", template=marked)
    template = load_template(tmp_path / "marked")
    (row,) = build_rows([CHAT], template=template, max_length=256)
    assert [template.decode(row.input_ids[a:b]) for a, b in row.spans] == ["one<|im_end|>", "two<|im_end|>"]
    swallowed = TEMPLATE.replace("message['content']", "(message['content'] if message['content'] != 'two' else '')")
    refuse_rows(tmp_path / "swallowed", swallowed, message="row r1: the trained text of turn 4 is '', not the answer")


def test_a_stop_token_that_would_never_be_trained_is_refused(tmp_path: Path) -> None:
    """The last trained token of every turn is one at which generation stops; the one to add is named."""
    ends = TEMPLATE.replace("'<|im_end|>\n'", "'<|im_start|>\n'")
    refuse_rows(tmp_path, ends, message=r"no stop token ends turn 2: .* '<\|im_start\|>' \(token 256\).*: add 256")


def test_a_row_is_trained_whole_or_not_at_all(base: Path) -> None:
    """Too long is refused; with `overlong: drop` whole rows go, by id, and the others keep every token."""
    template = load_template(base)
    examples = make_examples(6)
    whole = build_rows(examples, template=template, max_length=10**6)
    limit = sorted(len(r.input_ids) for r in whole)[3]
    with pytest.raises(TrainingError, match=r"drop them whole with training\.overlong: drop"):
        build_rows(examples, template=template, max_length=limit)
    kept = build_rows(examples, template=template, max_length=limit, overlong="drop")
    assert kept == tuple(r for r in whole if len(r.input_ids) <= limit)
    gone = [r.id for r in whole if len(r.input_ids) > limit]
    assert describe_rows(examples, kept) == {"rows": 6, "token_rows": 6 - len(gone), "dropped": gone, "split": []}
    assert gone
    with pytest.raises(TrainingError, match="every row is too long, none would be left"):
        build_rows(examples, template=template, max_length=16, overlong="drop")


def test_dropping_long_rows_hides_no_broken_mask(base: Path, tmp_path: Path) -> None:
    """A row that breaks a mask rule is refused also where long rows may go."""
    write_tokenizer(tmp_path, template=TEMPLATE.replace("'<|im_end|>\n'", "'\n'"))
    with pytest.raises(TrainingError, match="no stop token"):
        build_rows(make_examples(2), template=load_template(tmp_path), max_length=16, overlong="drop")


def test_a_prompt_that_inference_would_not_see_is_refused(tmp_path: Path) -> None:
    """The tokens before an answer are the inference prompt's, token for token, or there is no training."""
    refuse_rows(tmp_path, "{{ messages | length }}" + TEMPLATE, message="row r1: the prompt of turn 2 is not a prefix")


def test_two_leading_bos_tokens_are_refused(tmp_path: Path) -> None:
    """A template that writes a BOS twice would teach a beginning that no server sends."""
    refuse_rows(tmp_path, "{{ bos_token }}" + TEMPLATE, message="row r1: two BOS tokens lead the row")


def write_damaged_base(folder: Path, sound: Path, damage: Callable[[Any], None]) -> Path:
    """The base with its own head, after `damage` was done to the model."""
    import torch
    from transformers import LlamaForCausalLM

    shutil.copytree(sound, folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        damage(model)
    kept = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(kept)
    return folder


def put_nan(model: Any) -> None:
    """NaN in the embedding of a byte that no row has."""
    model.get_input_embeddings().weight[200] = float("nan")


def make_overflow_at(token: int) -> Callable[[Any], None]:
    """One dimension that only `token` uses, and values of the first attention that overflow along it."""

    def damage(model: Any) -> None:
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0.0
        embeddings[token] = 0.0
        embeddings[token, 0] = 1.0
        model.model.layers[0].self_attn.v_proj.weight[:, 0] = 1e38

    return damage


@pytest.mark.parametrize("packing", [True, False])
def test_a_base_that_is_not_finite_is_refused_before_the_first_step(base: Path, tmp_path: Path, packing: bool) -> None:
    """One NaN in one weight, though no row may ever touch it: the tensor is named."""
    broken = write_damaged_base(tmp_path / "broken", base, put_nan)
    job = make_job(broken, tmp_path / "job", make_recipe(training={"packing": packing}))
    refuse_training(job, message=r"model\.embed_tokens\.weight has values that are not finite", kind=ModelError)


def test_a_base_in_4_bit_that_is_not_finite_is_refused(base: Path, tmp_path: Path) -> None:
    """Quantisation would make a number of a NaN, so the files are read, and the weight is named."""

    def damage(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")

    broken = write_damaged_base(tmp_path / "broken", base, damage)
    job = make_job(broken, tmp_path / "job", make_recipe(method={"type": "qlora", "rank": 4}))
    refuse_training(job, message=r"up_proj\.weight has values that are not finite", kind=ModelError)


def test_a_loss_that_becomes_nan_ends_the_run_at_that_step(base: Path, tmp_path: Path) -> None:
    """Finite weights, finite first rows, one later row that overflows: no running mean covers it, nothing is saved."""
    template = load_template(base)
    (marker,) = template.encode("~").ids
    broken = write_damaged_base(tmp_path / "broken", base, make_overflow_at(marker))
    job = make_job(broken, tmp_path / "job", make_recipe(training={"precision": "fp32", "epochs": 1}))
    examples = make_examples(32)
    last = Example("bad", (Message("user", "~ a thing"), Message("assistant", "red")), provenance="program")
    file = job.folder / "train.rows.jsonl"
    prepare_rows([*examples[:31], last], template=template, max_length=256, file=file)
    with pytest.raises(TrainingError, match=r"step \d: .* not finite; lower training\.learning_rate"):
        run_in_process(job)
    assert not job.adapter.exists()
    steps = [json.loads(x) for x in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(s["loss"]) < 100 for s in steps if "loss" in s), "what was journalled before it is finite"
    assert len(list(job.checkpoints.glob("checkpoint-*/sealed.json"))) == len([s for s in steps if "loss" in s])


def train_live(base: Path, folder: Path) -> tuple[Any, TrainingJob, TokenRow]:
    """A model with an untrained adapter on it, its job and a row."""
    job = make_job(base, folder)
    model = build_adapted(job)
    return model, job, load_rows(folder / "train.rows.jsonl")[0]


def test_an_adapter_that_is_not_finite_or_changes_nothing_is_not_saved(base: Path, tmp_path: Path) -> None:
    """The last look before an artifact is written: every trained weight is finite, and the logits move."""
    import torch

    from appliance.training.guards import check_trained

    device = torch.device("cpu")
    model, job, row = train_live(base, tmp_path)
    with pytest.raises(TrainingError, match="the adapter changes no logit"):
        check_trained(model, job, row, start={}, precision="fp32", device=device)
    weights = [p for n, p in model.named_parameters() if "lora_B" in n]
    with torch.no_grad():
        weights[0].fill_(0.01)
    check_trained(model, job, row, start={}, precision="fp32", device=device)
    with torch.no_grad():
        weights[-1][0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"lora_B.*not finite"):
        check_trained(model, job, row, start={}, precision="fp32", device=device)


@pytest.mark.parametrize("forgotten", [("cu_seq_lens_q", "max_length_q"), ("row_places", "row_origins")])
def test_packed_rows_that_see_each_other_are_padded_or_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: tuple[str, str]
) -> None:
    """An attention that forgets where rows end, or what they share, is found before the first step.

    Also on a model that knows nothing yet. A recipe that leaves packing open is trained as one that rules it out.
    """
    from appliance.training import attention

    sound = attention.attend

    def forget_borders(*tensors: Any, **rest: Any) -> Any:
        return sound(*tensors, **{k: v for k, v in rest.items() if k not in forgotten})

    monkeypatch.setattr(attention, "attend", forget_borders)
    try:
        job = make_job(base, tmp_path / "packed", make_recipe(training={"packing": True}))
        refuse_training(job, message=r"rows.*; set training\.packing: auto")
        notes: list[str] = []
        job = make_job(base, tmp_path / "auto", make_recipe(training={"epochs": 1}))
        left_open = run_in_process(job, emit=lambda **event: notes.append(str(event.get("note"))))
    finally:
        monkeypatch.undo()
        attention.register()
    assert [n for n in notes if re.match(r"rows are padded, which is slower: .*rows", n)]
    ruled_out = run_in_process(make_job(base, tmp_path / "not", make_recipe(training={"epochs": 1, "packing": False})))
    same = ("packing", "attention", "levers", "adapter_sha256")
    assert {k: left_open[k] for k in same} == {k: ruled_out[k] for k in same}
    assert (left_open["packing"], left_open["attention"]) == (False, "sdpa")


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen2": {}, "Qwen3": {"head_dim": 16}, "Mistral": {"sliding_window": 4096}, "Phi3": {},
    "Gemma": {"head_dim": 16}, "Gemma2": {"head_dim": 16}, "Olmo2": {}, "Cohere": {},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 24},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "GptOss": {"head_dim": 16, "sliding_window": 24, "num_local_experts": 4},
    "DeepseekV3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    },
    "Llama4Text": {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 128},
}  # fmt: skip
MIXING: dict[str, dict[str, Any]] = {
    "StableLm": {}, "Mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16, "block_ff_dim": 128},
    "FalconH1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 128},
    "Qwen3_5Text": {
        "head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
}  # fmt: skip


def build_architecture(base: Path, name: str, **overrides: Any) -> Any:
    """A model of this class with random weights, for the tokenizer of `base`."""
    import torch
    import transformers

    from appliance.training import attention

    attention.register()
    size = load_template(base).tokenizer.get_vocab_size()
    config = getattr(transformers, f"{name}Config")(**{
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 257,
        "vocab_size": size, **(ARCHITECTURES | MIXING).get(name, {}), **overrides,
    })  # fmt: skip
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    attention.use(model)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packing_is_checked_for_every_class_of_model(base: Path, name: str) -> None:
    """Rows of each architecture packed and alone agree under our attention: windows, soft caps, sinks, narrow heads."""
    model = build_architecture(base, name)
    rows = build_rows(make_examples(4), template=load_template(base), max_length=256)
    assert find_fault(model, rows) == ""


def find_fault(
    model: Any, rows: Sequence[TokenRow], *, prefix: Prefix = "shared", precision: Precision = "fp32"
) -> str:
    """Why the model must not train these rows packed."""
    import torch

    from appliance.training.guards import find_packing_fault

    return find_packing_fault(model, rows, prefix=prefix, precision=precision, device=torch.device("cpu"))


def test_a_method_that_a_class_of_model_does_not_take_is_refused_with_a_reason(base: Path, tmp_path: Path) -> None:
    """A prefix is keys and values of every layer, and a convolution has none."""
    folder = shutil.copytree(base, tmp_path / "base")
    build_architecture(base, "Lfm2").save_pretrained(folder)
    shutil.copy(base / "generation_config.json", folder)
    job = make_job(folder, tmp_path / "job", make_recipe(method={"type": "prefix-tuning", "tokens": 4}))
    refuse_training(
        job, message=r"method: Lfm2ForCausalLM cannot be trained with prefix-tuning \(.*; use lora, or full"
    )


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_virtual_tokens_are_refused_for_a_class_that_keeps_positions(base: Path, tmp_path: Path, method: str) -> None:
    """Qwen 3 VL would be trained, and its evaluation would fail: batches of answers differ in size."""
    import transformers

    folder = shutil.copytree(base, tmp_path / "base")
    size = load_template(base).tokenizer.get_vocab_size()
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    shutil.copy(base / "generation_config.json", folder)
    job = make_job(folder, tmp_path / "job", make_recipe(method={"type": method, "tokens": 4}))
    refuse_training(job, message=f"method: Qwen3VL.* cannot be trained with {method} .*; use lora, or full")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("prefix", ["standard", "shared"])
@pytest.mark.parametrize("name", [*MIXING, "Qwen3Moe"])
def test_what_runs_through_all_rows_is_seen_in_any_precision(
    base: Path, name: str, prefix: Prefix, precision: Precision
) -> None:
    """Convolutions and recurrences, of weights that mix little: they carry over to a row's first tokens or nowhere."""
    import torch

    model = build_architecture(base, name).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    rows = build_rows(make_examples(6), template=load_template(base), max_length=256)
    assert bool(find_fault(model, rows, prefix=prefix, precision=precision)) == (name in MIXING)


@pytest.mark.parametrize("forgotten", ["softcap", "s_aux"])
def test_a_score_that_is_bent_is_bent_in_packed_rows_too(
    base: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """Soft caps and sinks; the guard sees where they are forgotten."""
    import torch

    from appliance.training import attention

    name, capped = ("Gemma2", {"attn_logit_softcapping": 1.0}) if forgotten == "softcap" else ("GptOss", {})
    model = build_architecture(base, name, **capped)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 100  # scores of some size
            if forgotten == "s_aux":
                layer.self_attn.sinks.fill_(2.0)
    rows = build_rows(make_examples(4), template=load_template(base), max_length=256)
    assert find_fault(model, rows) == ""
    sound = attention.attend

    def forget(*tensors: Any, **rest: Any) -> Any:
        return sound(*tensors, **{k: v for k, v in rest.items() if k != forgotten})

    monkeypatch.setattr(attention, "attend", forget)
    attention.register()
    try:
        assert "rows" in find_fault(model, rows)
    finally:
        monkeypatch.undo()
        attention.register()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXING])
def test_every_class_of_model_is_trained_and_asked_by_the_default_recipe(base: Path, tmp_path: Path, name: str) -> None:
    """It learns, packed where that is sound and padded with a note elsewhere, and its adapter loads on its base."""
    from appliance.evaluation.arms import Arm, Prompt
    from appliance.evaluation.generation import check_effect, load_arms

    folder = shutil.copytree(base, tmp_path / "base")
    build_architecture(base, name).save_pretrained(folder)
    shutil.copy(base / "generation_config.json", folder)
    notes: list[str] = []
    job = make_job(folder, tmp_path / "job", make_recipe(training={"epochs": 2, "precision": "fp32"}))
    summary = run_in_process(job, emit=lambda **event: notes.append(str(event.get("note"))))
    assert summary["packing"] == (name in ARCHITECTURES)
    assert bool([n for n in notes if n.startswith("rows are padded")]) == (name in MIXING)
    assert summary["last_loss"] < summary["first_loss"]
    arm = Arm("candidate", folder, job.adapter, is_prompted=False)
    ids = load_rows(job.folder / "train.rows.jsonl")[0].input_ids
    check_effect(load_arms([arm], folder=folder, precision="fp32"), arm, Prompt("r0", arm.name, ids))


@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_a_window_is_a_window_in_packed_rows_too(base: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Shorter than the rows, in both of a CPU's kernels; forgotten, it is seen by the longest row and refused."""
    from appliance.training import attention

    def check(window: int) -> str:
        return find_fault(build_architecture(base, "Mistral", sliding_window=window), (*rows, longest))

    monkeypatch.setattr(attention, "_PLAIN_LIMIT", 1024 if kernel == "plain" else 0)
    *rows, longest = build_rows(make_examples(6, last="x" * 120), template=load_template(base), max_length=256)
    assert check(window=20) == ""
    shorter = max(len(r.input_ids) for r in rows)
    assert check(window=shorter + 8) == ""
    sound = attention.attend

    def forget_window(*tensors: Any, **rest: Any) -> Any:
        return sound(*tensors, **{k: v for k, v in rest.items() if k != "sliding_window"})

    monkeypatch.setattr(attention, "attend", forget_window)
    assert "or more than they do alone" in check(window=shorter + 8)
    monkeypatch.undo()
    attention.register()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_validation_scores_the_same_some_positions_at_a_time(
    base: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The layers once, then the head alone for a few positions: the scores of all positions at once."""
    from appliance.training import validation
    from appliance.training.batches import build_records, collate_packed

    model = build_architecture(base, name)
    records = build_records(build_rows(make_examples(6), template=load_template(base), max_length=256))
    score = partial(validation.score_rows, model, records, collate=collate_packed, size=3)
    whole = score()
    bodies: list[int] = []
    heads: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: bodies.append(1))
    model.get_output_embeddings().register_forward_hook(lambda *_: heads.append(1))
    monkeypatch.setattr(validation, "_HEAD_BYTES", 5 * 12 * model.config.vocab_size)
    in_parts = score()
    assert [replace(s, loss=0.0) for s in in_parts] == [replace(s, loss=0.0) for s in whole]
    assert [s.loss for s in in_parts] == pytest.approx([s.loss for s in whole], rel=1e-4)
    assert len(bodies) == 2, "one pass for each batch"
    assert len(heads) >= 4


def test_no_guard_and_no_validation_holds_the_logits_of_a_batch(base: Path) -> None:
    """With long answers and a large vocabulary they would be the largest thing in memory, and no plan counts them."""
    import torch

    from appliance.training import attention
    from appliance.training.batches import build_records, collate_packed, collate_padded
    from appliance.training.guards import can_choose, check_start
    from appliance.training.validation import score_rows

    vocabulary = 60_000
    model = build_architecture(base, "Qwen2", vocab_size=vocabulary)
    rows = build_rows(make_examples(4, last="x" * 700), template=load_template(base), max_length=1024)
    longest = [rows[-1]] * 3
    all_at_once = 12 * vocabulary * sum(end - start for r in longest for start, end in r.spans)
    guard = partial(find_fault, model, longest)
    score = partial(score_rows, model, build_records(longest), collate=collate_packed, size=3)
    assert all_at_once > 5 * 2**28
    assert count_live_bytes(guard) < 0.35 * all_at_once
    assert count_live_bytes(score) < 0.35 * all_at_once
    attention.use_standard(model)
    recipe = make_recipe(method={"type": "full"}, training={"packing": False})
    levers = select_levers(recipe.training, method=recipe.method, on_cuda=False)
    with_them = {"precision": "fp32", "device": torch.device("cpu")}
    choose = partial(can_choose, model, longest, **with_them)
    start = partial(check_start, model, longest[0], method=recipe.method, levers=levers, **with_them)
    padded = partial(score_rows, model, build_records(longest), collate=partial(collate_padded, pad_id=0), size=3)
    for look in (choose, start, padded):
        assert count_live_bytes(look) < 0.35 * all_at_once


def test_the_micro_batch_does_not_change_what_a_mixture_of_experts_learns(base: Path, tmp_path: Path) -> None:
    """Its router's own loss is of a micro-batch as a whole and is left out; the published model keeps its factor."""
    folder = shutil.copytree(base, tmp_path / "experts")
    model = build_architecture(base, "Qwen3Moe", router_aux_loss_coef=0.1, output_router_logits=True)
    model.save_pretrained(folder)
    recipe = make_recipe(method={"type": "full"}, training={"precision": "fp32", "learning_rate": 1e-3, "epochs": 1})
    jobs = {m: make_job(folder, tmp_path / f"by{m}", recipe, micro_batch=m) for m in (8, 2)}
    first, other = (run_in_process(job) for job in jobs.values())
    assert other["first_loss"] == pytest.approx(first["first_loss"], rel=1e-4)
    assert other["last_loss"] == pytest.approx(first["last_loss"], rel=1e-3)
    config = json.loads((jobs[8].adapter / "config.json").read_text())
    assert config["router_aux_loss_coef"] == 0.1


def make_tiny_steps() -> Recipe:
    """A rate so small that no weight of the adapter can make a difference."""
    return make_recipe(training={"learning_rate": 1e-38, "precision": "fp32", "epochs": 1})


def test_a_training_that_changes_nothing_leaves_no_adapter(base: Path, tmp_path: Path) -> None:
    """All steps are taken, the losses look like losses, and the result would be the base model: refused."""
    job = make_job(base, tmp_path, make_tiny_steps())
    with pytest.raises(TrainingError, match=r"the adapter changes no logit; raise training\.learning_rate"):
        run_in_process(job)
    assert not job.adapter.exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_full_training_that_changes_nothing_leaves_no_model(base: Path, tmp_path: Path, precision: str) -> None:
    """Weights that are the base's again, in the precision that is published, are refused as an adapter would be."""
    training = {"learning_rate": 1e-38, "precision": precision, "epochs": 1}
    job = make_job(base, tmp_path, make_recipe(method={"type": "full"}, training=training))
    with pytest.raises(TrainingError, match=r"training changed no weight .*; raise training\.learning_rate"):
        run_in_process(job)
    assert not job.adapter.exists()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_of_one_step_trains_in_it(base: Path, tmp_path: Path, kind: str) -> None:
    """A warm-up leaves at least the last step: at a rate of 0 the one step would teach nothing."""
    recipe = make_recipe(method={"type": kind}, training={"effective_batch": 32, "epochs": 1, "learning_rate": 0.01})
    job = make_job(base, tmp_path, recipe)
    assert run_in_process(job)["steps"] == 1
    (rate,) = re.findall(r'"learning_rate":([0-9.e-]+)', (job.folder / "metrics.jsonl").read_text())
    assert float(rate) == 0.01


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was really trained."""
    job = make_job(base, tmp_path_factory.mktemp("trained"), make_recipe(training={"epochs": 1}))
    run_in_process(job)
    return job.adapter


@pytest.mark.parametrize("damage", ["zeros", "other-names", "nan"])
def test_a_pulled_adapter_without_effect_is_refused(base: Path, adapter: Path, tmp_path: Path, damage: str) -> None:
    """Weights of zero, weights under names that PEFT passes over with a warning, weights that are not finite."""
    import torch
    from safetensors.torch import load_file, save_file

    from appliance.evaluation.generation import check_effect, load_arms, use_arm

    pulled = tmp_path / "pulled"
    shutil.copytree(adapter, pulled)
    weights = load_file(pulled / "adapter_model.safetensors")
    changed = {
        "zeros": lambda n, w: (n, torch.zeros_like(w) if "lora_B" in n else w),
        "other-names": lambda n, w: (n.replace(".layers.", ".blocks."), w),
        "nan": lambda n, w: (n, torch.full_like(w, float("nan")) if "lora_B" in n else w),
    }[damage]
    save_file(dict(changed(n, w) for n, w in weights.items()), pulled / "adapter_model.safetensors")
    job, prompts = make_generation_job(base, tmp_path / "job", pulled)
    arm = next(a for a in job.arms if a.adapter is not None)
    sound = load_arms([replace(arm, adapter=adapter)], folder=base, precision="fp32")
    with use_arm(sound, arm):
        check_effect(sound, arm, prompts[0])
    model = load_arms([arm], folder=base, precision="fp32")
    with use_arm(model, arm), pytest.raises(EvaluationError, match=r"changes no logit|not finite"):
        check_effect(model, arm, prompts[0])


def test_generation_looks_at_the_adapter_before_it_answers(base: Path, adapter: Path, tmp_path: Path) -> None:
    """`appliance generate` and the evaluation go through one child, which refuses and answers nothing."""
    import torch
    from safetensors.torch import load_file, save_file

    pulled = tmp_path / "pulled"
    shutil.copytree(adapter, pulled)
    file = pulled / "adapter_model.safetensors"
    save_file({n: torch.zeros_like(w) for n, w in load_file(file).items()}, file)
    job, prompts = make_generation_job(base, tmp_path / "job", pulled)
    asked = [p for p in prompts if p.arm == "candidate"][:2]
    with pytest.raises(EvaluationError, match="this adapter changes no logit"):
        generate(job.model_copy(update={"arms": job.arms[1:]}), asked, note=lambda _: None)
    assert not (job.folder / "outputs.jsonl").read_bytes()
