"""Laws of the methods: each trains for real, changes the model, is counted exactly and comes back the same."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml
from test_cli import call
from test_training import make_examples, make_job, run_in_process
from tiny import build_adapted, make_recipe, make_stop, write_base, write_dataset

from appliance.errors import InterruptedRunError, ModelError, RecipeError, TrainingError
from appliance.evaluation.arms import Arm, Prompt
from appliance.evaluation.generate import GenerationJob
from appliance.evaluation.outputs import decode_outputs
from appliance.evaluation.worker import group_arms
from appliance.method import LoraMethod, Method, QloraMethod
from appliance.model import load_template
from appliance.model.shapes import count_values, read_sizes, read_weight_shapes
from appliance.plan import Machine, build_plan
from appliance.plan.plan import count_trainable
from appliance.preparation import Origin, Workspace
from appliance.recipe import is_packed, parse_recipe
from appliance.training import TrainingJob
from appliance.training.arguments import CHANGING_THE_BASE, build_adapter_arguments
from appliance.training.batches import build_records, collate_packed, collate_padded, drop_places, move_batch
from appliance.training.rows import load_rows


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


FAST: list[dict[str, Any]] = [
    {"type": "lora", "rank": 4, "variant": "dora"},
    {"type": "lora", "rank": 4, "variant": "pissa"},
    {"type": "lora", "rank": 4, "variant": "mica"},
    {"type": "lora", "rank": 3, "variant": "rslora"},
    {"type": "qlora", "rank": 4},
    {"type": "qlora", "rank": 4, "variant": "loftq"},
    {"type": "prompt-tuning", "tokens": 12, "init": "text", "text": "colour:"},
    {"type": "prefix-tuning", "tokens": 6},
    {"type": "p-tuning", "tokens": 6, "hidden": 32},
    {"type": "ia3"},
]
SLOW: list[dict[str, Any]] = [
    *({"type": "lora", "rank": 4, "variant": v} for v in ("plain", "rslora", "gaussian", "orthogonal", "olora")),
    {"type": "lora", "rank": 4, "targets": ["self_attn.q_proj", "v_proj"], "dropout": 0.1},
    *({"type": "qlora", "rank": 4, "variant": v} for v in ("rslora", "dora", "gaussian", "orthogonal", "olora")),
    {"type": "prompt-tuning", "tokens": 6},
    {"type": "prompt-tuning", "tokens": 6, "init": "random"},
    {"type": "prefix-tuning", "tokens": 6, "init": "random", "projection": "mlp", "hidden": 24},
    {"type": "p-tuning", "tokens": 6, "hidden": 16, "encoder": "lstm"},
    {"type": "ia3", "targets": ["q_proj", "down_proj"], "feedforward": []},
    {"type": "full"},
]
RATES = {"full": 1e-3, "prompt-tuning": 0.1, "prefix-tuning": 0.1, "p-tuning": 0.02, "ia3": 0.05}


def name(method: dict[str, Any]) -> str:
    """A method's words, for test ids."""
    return "-".join(str(v) for v in method.values() if isinstance(v, str))


@dataclass
class Trained:
    """A finished run: its job and summary, the live model, and the loss over all its rows before and after."""

    job: TrainingJob
    summary: dict[str, Any]
    model: Any
    losses: tuple[float, float]


def train(base: Path, folder: Path, method: dict[str, Any], **training: Any) -> Trained:
    """Train the tiny model in this process."""
    from appliance.training import trainer

    section = {"learning_rate": RATES.get(method["type"], 0.01), "precision": "fp32", **training}
    job = make_job(base, folder, make_recipe(method=method, training=section))
    seen: dict[str, Any] = {}
    build = trainer.build_model

    def keep(*arguments: Any, **options: Any) -> Any:
        seen["model"] = build(*arguments, **options)
        seen["before"] = measure_loss(seen["model"], job)
        return seen["model"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_model", keep)
        summary = run_in_process(job)
    return Trained(job, summary, seen["model"], (seen["before"], measure_loss(seen["model"], job)))


def measure_loss(model: Any, job: TrainingJob) -> float:
    """The mean loss over every training row."""
    import torch

    records = build_records(load_rows(job.folder / "train.rows.jsonl"))
    was_training = model.training
    batch = (
        collate_packed(records)
        if is_packed(job.training, job.method)
        else drop_places(collate_padded(records, pad_id=257))
    )
    with torch.no_grad():
        loss = float(model.eval()(**move_batch(batch, model.device), use_cache=False).loss)
    model.train(was_training)
    return loss


def read_logits(model: Any, base: Path) -> Any:
    """The logits of a prompt's last position."""
    import torch

    ids = load_template(base).encode_prompt(make_examples(1)[0].prompt)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]


def check_method_learns(base: Path, folder: Path, method: dict[str, Any]) -> None:
    """The law of every method, in one place."""
    import torch

    from appliance.evaluation.generation import load_arms, use_arm

    done = train(base, folder, method, epochs=3)
    assert done.losses[1] < done.losses[0] - 0.005
    weights, sizes = read_weight_shapes(base), read_sizes(base)
    assert done.summary["trainable_parameters"] == count_trainable(done.job.method, weights, sizes)
    assert done.summary["total_parameters"] == count_values(weights), "the base's alone, whole also in 4 bits"
    untouched = read_logits(load_arms([], folder=base, precision="fp32"), base)
    if method["type"] == "full":
        tuned = read_logits(load_arms([], folder=done.job.adapter, precision="fp32"), base)
    else:
        arm = Arm("candidate", base, done.job.adapter, is_prompted=False)
        loaded = load_arms([arm], folder=base, precision="fp32")
        with use_arm(loaded, arm):
            tuned = read_logits(loaded, base)
        with use_arm(loaded, Arm("zero_shot", base, None, is_prompted=False)):
            assert torch.equal(read_logits(loaded, base), untouched), "beside an adapter, the base is still the base"
        config = (done.job.adapter / "adapter_config.json").read_text()
        assert str(base) not in config
        assert str(folder) not in config
        assert not json.loads(config).get("use_rslora"), "llama.cpp and Ollama know the scale alpha / rank alone"
    effect = float((tuned - untouched).abs().max())
    rounding = float((tuned - read_logits(done.model.eval(), base)).abs().max())
    assert effect > 0.01
    assert rounding < (0.1 * effect if method["type"] == "qlora" else 1e-5)


@pytest.mark.parametrize("method", FAST, ids=name)
def test_every_method_learns_and_comes_back_the_same(base: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """The loss falls, the logits change, the count is the plan's, and evaluation loads what was trained."""
    check_method_learns(base, tmp_path, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", SLOW, ids=name)
def test_every_variant_learns_and_comes_back_the_same(base: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """The same law for every variant, start and encoder."""
    check_method_learns(base, tmp_path, method)


RESUMED: list[dict[str, Any]] = [
    {"type": "qlora", "rank": 4, "variant": "loftq"},
    {"type": "lora", "rank": 4, "variant": "pissa"},
    {"type": "p-tuning", "tokens": 6, "hidden": 32},
]


@pytest.mark.parametrize("method", RESUMED, ids=name)
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(
    base: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Checkpoints hold all that a method trains, in the precision it is trained in."""
    from appliance.training.trainer import run_job

    whole = train(base, tmp_path / "whole", method)
    recipe = make_recipe(
        method=method, training={"learning_rate": RATES.get(method["type"], 0.01), "precision": "fp32"}
    )
    job = make_job(base, tmp_path / "stopped", recipe)
    stop = make_stop()

    def stop_early(**event: Any) -> None:
        stop.is_set = event.get("step", 0) >= 1

    with pytest.raises(InterruptedRunError):
        run_job(job, stop=stop, emit=stop_early)  # type: ignore[arg-type]
    assert not job.adapter.exists()
    assert run_in_process(job)["adapter_sha256"] == whole.summary["adapter_sha256"]
    dtypes = {p.dtype for p in whole.model.parameters() if p.requires_grad}
    assert [str(d) for d in dtypes] == ["torch.float32"]


def test_a_start_that_differs_is_not_resumed(base: Path, tmp_path: Path) -> None:
    """A part of the base is taken out; a checkpoint made with another part would not fit."""
    from appliance.training.methods import copy_start, digest_start

    method = {"type": "lora", "rank": 4, "variant": "pissa"}
    job = make_job(base, tmp_path, make_recipe(method=method, training={"precision": "fp32"}))
    starts = [copy_start(build_adapted(job), job.method) for _ in range(2)]
    assert digest_start(starts[0]) == digest_start(starts[1])
    key = min(starts[1])
    starts[1][key] = starts[1][key] + 1e-6
    assert digest_start(starts[0]) != digest_start(starts[1])


def test_the_method_decides_whether_rows_are_packed(base: Path, tmp_path: Path) -> None:
    """`auto` packs wherever rows can share a flat batch, and pads where virtual tokens come before each."""
    for method in [*FAST, *SLOW]:
        recipe = make_recipe(method=method)
        assert is_packed(recipe.training, recipe.method) is ("tokens" not in method)
    plain = make_recipe(training={"packing": False})
    assert not is_packed(plain.training, plain.method)


REFUSED = [
    ({"type": "qlora", "variant": "pissa"}, {}, "in 4 bits here; use it with lora"),
    ({"type": "qlora", "variant": "mica"}, {}, "in 4 bits here; use it with lora"),
    ({"type": "lora", "variant": "loftq"}, {}, "use it with qlora"),
    ({"type": "lora", "variant": "orthogonal", "rank": 3}, {}, "even rank"),
    ({"type": "lora", "targets": []}, {}, "no layer is named"),
    ({"type": "lora", "targets": ["q_proj", "lm_head"]}, {}, "lm_head cannot be a target"),
    ({"type": "prompt-tuning"}, {"packing": True}, "r.yaml:6: training.packing: prompt-tuning puts virtual tokens"),
    ({"type": "p-tuning"}, {"packing": True}, "virtual tokens"),
    ({"type": "prefix-tuning"}, {"gradient_checkpointing": "on"}, "r.yaml:6: training.gradient_checkpointing"),
    ({"type": "prefix-tuning", "hidden": 8}, {}, "remove it or add the projection"),
    ({"type": "prompt-tuning", "init": "text"}, {}, "give both or neither"),
    ({"type": "prompt-tuning", "text": "x"}, {}, "give both or neither"),
    ({"type": "prompt-tuning", "tokens": 0}, {}, "greater than or equal to 1"),
    ({"type": "ia3", "targets": ["k_proj"], "feedforward": ["down_proj"]}, {}, "not among the targets"),
    ({"type": "p-tuning", "rank": 4}, {}, "unknown key method.rank"),
    ({"type": "prompt_tuning"}, {}, "did you mean prompt-tuning?"),
]


@pytest.mark.parametrize(("method", "training", "message"), REFUSED)
def test_an_impossible_combination_is_refused_in_the_recipe(
    method: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    """What a library would do silently, or fail at later, is one line with its place."""
    head = "name: a\nbase: {model: ./base}\ndataset: {path: datasets/a}\n"
    text = f"{head}method: {json.dumps(method)}\ntraining:\n  {json.dumps(training)[1:-1] or 'epochs: 3'}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="r.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


UNFIT = [
    ({"type": "lora", "targets": ["q_proj", "qkv"]}, "qkv matches no layer; linear layers of this model: down_proj"),
    ({"type": "ia3", "targets": ["wo"]}, "wo matches no layer; linear layers of this model: down_proj, gate_proj"),
    (
        {"type": "lora", "rank": 40},
        r"method\.rank: 40 is more than .*k_proj can use, whose weight is 32 x 64; set it to 32",
    ),
    ({"type": "qlora", "rank": 40, "targets": ["v_proj"]}, "v_proj can use"),
    ({"type": "prompt-tuning", "tokens": 3, "init": "text", "text": "colour"}, r"6 tokens, method\.tokens is 3"),
]


@pytest.mark.parametrize(("method", "message"), UNFIT, ids=lambda v: name(v) if isinstance(v, dict) else "")
def test_a_method_that_does_not_fit_the_model_is_refused_by_plan_and_training(
    base: Path, tmp_path: Path, method: dict[str, Any], message: str
) -> None:
    """The plan knows it from the headers of the files, and training from the layers."""
    recipe = make_recipe(method=method)
    with pytest.raises(TrainingError, match=message):
        build_plan(
            recipe,
            lengths=[9],
            trained_tokens=3,
            validation_rows=1,
            base=base,
            machine=Machine(2, memory_bytes=1 << 33),
        )
    job = make_job(base, tmp_path, recipe)
    with pytest.raises(TrainingError, match=message):
        run_in_process(job)
    assert not job.adapter.exists()


@pytest.mark.parametrize("method", [{"type": "lora", "rank": 4}, {"type": "qlora", "rank": 4}], ids=name)
@pytest.mark.parametrize("fault", ["nan", "inf", "missing", "truncated"])
def test_a_damaged_base_is_refused_by_the_name_of_the_weight(
    base: Path, tmp_path: Path, method: dict[str, Any], fault: str
) -> None:
    """NaN, infinity, an absent weight, half a file: before the first step, 4 bits or 16."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    file, spoilt = broken / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    if fault == "missing":
        del weights[spoilt]
    else:
        weights[spoilt][3, 5] = float(fault) if fault != "truncated" else 0.0
    save_file(weights, file, metadata={"format": "pt"})
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    job = make_job(base, tmp_path / "job", make_recipe(method=method)).model_copy(update={"base": broken})
    with pytest.raises(ModelError, match="cannot be loaded" if fault == "truncated" else spoilt.replace(".", r"\.")):
        run_in_process(job)
    if fault == "truncated":
        with pytest.raises(ModelError, match="its header says"):
            read_weight_shapes(broken)
    assert not (tmp_path / "job" / "metrics.jsonl").exists(), "no step was taken"


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained adapter of each kind."""
    methods = [m for m in FAST if m["type"] in RATES] + [{"type": "lora", "rank": 4}]
    return {m["type"]: train(base, tmp_path_factory.mktemp("adapter"), m).job.adapter for m in methods}


def test_a_batch_of_prompts_is_answered_as_each_alone(base: Path, adapters: dict[str, Path]) -> None:
    """Greedy logits of a batch of mixed lengths are those of plain forward passes, for every kind of adapter."""
    import torch

    from appliance.evaluation.generation import cut_batches, generate_batch, load_arms, select_padding, use_arm

    template = load_template(base)
    prompts = [Prompt(e.id, "candidate", template.encode_prompt(e.prompt)) for e in make_examples(13)]
    again = {"lora in 4 bits": adapters["lora"], "lora, spread": adapters["lora"]}
    for kind, adapter in (adapters | again).items():
        arm = Arm("candidate", base, adapter, is_prompted=False)
        model = load_arms([arm], folder=base, precision="fp32", four_bit="4 bits" in kind, spread="spread" in kind)
        assert ("4 bits" in kind) == any(type(m).__name__ == "Linear4bit" for m in model.modules())
        with use_arm(model, arm):
            batches = cut_batches(prompts, 4, padding=select_padding(arm))
            assert sum(map(len, batches)) == len(prompts)
            for batch in batches:
                outputs = generate_batch(model, batch, template=template, stop_ids=[257], max_new_tokens=4)
                for prompt, output in zip(batch, outputs, strict=True):
                    ids = list(prompt.input_ids)
                    with torch.no_grad():
                        for _ in range(4):
                            ids.append(
                                int(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].argmax())
                            )
                    answer = ids[-4:]
                    assert output.output == template.decode(answer[: [*answer, 257].index(257)]), kind


@pytest.mark.slow
def test_what_was_trained_in_4_bits_is_judged_in_4_bits_where_16_do_not_fit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arms on the same rounded base, told in the notes and on the card; on a larger machine in 16 bits."""
    from appliance import pipeline

    write_dataset(tmp_path / "datasets" / "colours", rows=60)
    (tmp_path / "base").symlink_to(base)
    recipe = make_recipe(method={"type": "qlora", "rank": 4}, training={"epochs": 1})
    for gib in (1, 8):
        said: list[str] = []
        monkeypatch.setattr(pipeline, "read_machine", lambda g=gib: Machine(cores=1, memory_bytes=g << 30))
        workspace = Workspace(tmp_path, tmp_path / "cache", tmp_path / f"runs-{gib}", note=said.append)
        origin = Origin(commit=None, time="2026-01-31T12:00:00Z", actor="tester")
        done = pipeline.run_recipe(recipe, workspace=workspace, store=None, origin=origin, until="evaluate")
        assert done.folder is not None
        card = json.loads((done.folder / "card" / "card.json").read_bytes())
        words = (done.folder / "card" / "card.md").read_text()
        assert card["evaluation"] == {"four_bit": gib == 1}
        assert ("4 bits (NF4), as trained" in words) == (gib == 1)
        assert any("the base in 4 bits, as trained" in line for line in said) == (gib == 1)
        assert any("in 16 bits it takes about 1.0 of 1.0 GiB" in line for line in said) == (gib == 1)
        job = json.loads((done.folder / "evaluation" / "job.json").read_bytes())
        assert job["four_bit"] == (gib == 1)


def test_adapters_of_different_kinds_are_compared_in_one_evaluation(
    base: Path, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    """A candidate by prompt tuning meets a champion by LoRA: each answers as it does alone."""
    template = load_template(base)
    tuned = [
        Arm("champion", base, adapters["lora"], is_prompted=False),
        Arm("candidate", base, adapters["prompt-tuning"], is_prompted=False),
    ]
    arms = [Arm("zero_shot", base, None, is_prompted=True), *tuned]
    assert sorted(len(g) for g in group_arms(arms)) == [1, 2], "no model is loaded for the base alone"
    answers = {}
    for label, chosen in [("together", arms), *((a.name, [a]) for a in arms)]:
        prompts = [Prompt(e.id, a.name, template.encode_prompt(e.prompt)) for a in chosen for e in make_examples(6)]
        job = GenerationJob(
            folder=tmp_path / label, arms=tuple(chosen), stop_ids=(257,), max_new_tokens=6, batch=4, precision="fp32"
        )
        (tmp_path / label).mkdir()
        answers[label] = {(o.arm, o.id): o.output for o in answer_in_process(job, prompts)}
    alone = {k: v for label in ("zero_shot", "champion", "candidate") for k, v in answers[label].items()}
    assert answers["together"] == alone


def answer_in_process(job: GenerationJob, prompts: list[Prompt]) -> tuple[Any, ...]:
    """The generation child's work in this process."""
    from appliance.evaluation.worker import main

    (job.folder / "prompts.jsonl").write_bytes(b"".join(msgspec.json.encode(p) + b"\n" for p in prompts))
    (job.folder / "job.json").write_text(job.model_dump_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appliance.child.signal.signal", lambda *_: None)
        assert main(job.folder) == 0
    return decode_outputs((job.folder / "outputs.jsonl").read_bytes())


@pytest.mark.parametrize("kind", ["prompt-tuning", "ia3"])
def test_gradient_checkpointing_changes_memory_and_not_the_result(base: Path, tmp_path: Path, kind: str) -> None:
    """The gradients of a step are those without it."""
    import torch

    method = next(m for m in FAST if m["type"] == kind)
    recipe = make_recipe(method=method, training={"precision": "fp32", "packing": False})
    job = make_job(base, tmp_path, recipe)
    records = build_records(load_rows(tmp_path / "train.rows.jsonl"))[:4]
    model = build_adapted(job).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()  # as TRL does
        model.zero_grad()
        model(**drop_places(collate_padded(records, pad_id=257)), use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for without, with_it in zip(*gradients, strict=True):
        assert float(without.abs().max()) > 0
        torch.testing.assert_close(with_it, without, atol=1e-7, rtol=1e-4)


def test_a_validation_pass_leaves_the_gradients_of_4_bit_layers_as_they_are(base: Path, tmp_path: Path) -> None:
    """A CPU's layout for inference has no gradient; a pass in evaluation mode must not switch to it."""
    import torch

    job = make_job(base, tmp_path, make_recipe(method={"type": "qlora", "rank": 4, "variant": "gaussian"}))
    model = build_adapted(job)
    batch = collate_packed(build_records(load_rows(tmp_path / "train.rows.jsonl"))[:4])
    gradients = []
    for _ in range(2):
        model.train().zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        with torch.no_grad():
            model.eval()(**batch, use_cache=False)
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    assert sum(float(g.abs().sum()) for g in gradients[0].values()) > 0


LORA = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "use_rslora": False,
    "use_dora": False, "init_lora_weights": True, "bias": "none", "task_type": "CAUSAL_LM",
}  # fmt: skip
GOLDEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "full"}, {}),
    ({"type": "lora"}, LORA),
    ({"type": "lora", "variant": "rslora"}, {**LORA, "use_rslora": True}),
    ({"type": "lora", "variant": "dora"}, {**LORA, "use_dora": True}),
    *(
        ({"type": "lora", "variant": v}, {**LORA, "init_lora_weights": v})
        for v in ("gaussian", "orthogonal", "pissa", "olora", "mica")
    ),
    ({"type": "qlora", "rank": 8, "alpha": 8, "targets": ["q_proj"]},
     {**LORA, "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}),
    ({"type": "qlora", "variant": "loftq"}, LORA),
    ({"type": "prompt-tuning"},
     {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB", "task_type": "CAUSAL_LM"}),
    ({"type": "prompt-tuning", "tokens": 5, "init": "text", "text": "a b"},
     {"num_virtual_tokens": 5, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b",
      "task_type": "CAUSAL_LM"}),
    ({"type": "prefix-tuning"},
     {"num_virtual_tokens": 20, "init_weights": "zero", "prefix_projection": False, "encoder_hidden_size": None,
      "task_type": "CAUSAL_LM"}),
    ({"type": "prefix-tuning", "init": "random", "projection": "mlp", "hidden": 9},
     {"num_virtual_tokens": 20, "init_weights": None, "prefix_projection": True, "encoder_hidden_size": 9,
      "task_type": "CAUSAL_LM"}),
    ({"type": "p-tuning", "encoder": "lstm"},
     {"num_virtual_tokens": 20, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 128,
      "task_type": "CAUSAL_LM"}),
    ({"type": "ia3"},
     {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"],
      "task_type": "CAUSAL_LM"}),
    ({"type": "ia3", "targets": ["wq", "w2"], "feedforward": ["w2"]},
     {"target_modules": ["wq", "w2"], "feedforward_modules": ["w2"], "task_type": "CAUSAL_LM"}),
]  # fmt: skip


def test_an_lstm_computes_in_fp32_whatever_the_rest_does(base: Path, tmp_path: Path) -> None:
    """On CUDA autocast would make it fp16, whose gradients need a scale that bf16 training has not."""
    import torch

    from appliance.model.weights import compute_as_trained
    from appliance.training.levers import select_levers
    from appliance.training.methods import build_model

    cpu = torch.device("cpu")
    job = make_job(base, tmp_path, make_recipe(method={"type": "p-tuning", "hidden": 16, "encoder": "lstm"}))
    levers = select_levers(job.training, method=job.method, on_cuda=False)
    model = build_model(job, levers=levers, precision="bf16", device=cpu)
    found = {}
    for module in model.prompt_encoder.modules():
        if isinstance(module, torch.nn.LSTM | torch.nn.Linear):
            module.register_forward_hook(lambda m, _i, out: found.update({type(m): out[0].dtype}))
    with compute_as_trained("bf16", device=cpu):
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    assert found == {torch.nn.LSTM: torch.float32, torch.nn.Linear: torch.bfloat16}


@pytest.mark.parametrize(("method", "arguments"), GOLDEN)
def test_the_arguments_of_peft_are_what_the_recipe_says(method: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Golden: a pure function of the section, for every method."""
    assert build_adapter_arguments(make_recipe(method=method).method) == arguments


def test_the_plan_knows_what_virtual_tokens_cost(base: Path) -> None:
    """They count as tokens of every row; a prefix costs keys and values, and is never checkpointed."""
    peaks = {}
    for tokens in (1, 500):
        for kind in ("prompt-tuning", "prefix-tuning"):
            recipe = make_recipe(method={"type": kind, "tokens": tokens})
            plan = build_plan(
                recipe, lengths=[100] * 64, trained_tokens=9, validation_rows=1, base=base, machine=Machine(2, 1 << 20)
            )
            peaks[kind, tokens] = plan.peak_bytes
            assert plan.checkpointing is (kind == "prompt-tuning"), "nothing fits, so the rest is checkpointed"
    assert plan.micro_batch == 1, "nothing fits, so as little as can be"
    assert all(peaks[kind, 500] > peaks[kind, 1] for kind in ("prompt-tuning", "prefix-tuning"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix-tuning", "p-tuning", "ia3"])
def test_a_version_of_every_kind_is_published_pulled_and_answers(tmp_path: Path, kind: str) -> None:
    """From rows to an answer by the command line, as for LoRA; the file's digest is in the manifest."""
    write_base(tmp_path / "base")
    write_dataset(tmp_path / "datasets" / "colours", rows=60)
    recipe = make_recipe(method={"type": kind}, training={"epochs": 1, "learning_rate": RATES[kind]})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    env = {"APPLIANCE_STORE": f"file://{tmp_path / 'store'}", "APPLIANCE_CACHE": str(tmp_path / "cache")}
    assert call("run", "recipe.yaml", cwd=tmp_path, env=env).returncode in (0, 3)
    (row,) = json.loads(call("list", "--json", cwd=tmp_path, env=env).stdout)
    pulled = call("pull", f"colours@{row['version']}", str(tmp_path / "pulled"), cwd=tmp_path, env=env)
    assert "verified" in pulled.stdout, pulled.stderr
    said = call("generate", "pulled", "--prompt", "thing 1: red", "--compare", "--json", cwd=tmp_path, env=env)
    assert {o["arm"] for o in json.loads(said.stdout)} == {"candidate", "zero_shot"}, said.stderr


PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text("utf-8")


def read_table(title: str) -> dict[str, list[str]]:
    """The rows of the page's table whose first column is headed `title`, by their first cell."""
    (table,) = re.findall(rf"^\| {title} \| (?!When).*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)[:1]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_page_names_every_method_and_key_and_no_other() -> None:
    """Who writes a recipe from docs/methods.md writes a valid one."""
    sections = {get_args(m.model_fields["type"].annotation)[0]: m for m in get_args(get_args(Method)[0])}
    table = read_table("Method")
    assert table.keys() == sections.keys()
    for kind, section in sections.items():
        told = re.findall(r"`([a-z_]+)` \(", table[kind][0])
        assert told == [k for k in section.model_fields if k != "type"], kind
        for key, value in re.findall(r"`([a-z_]+)` \(([a-z0-9-]+)[;:)]", table[kind][0]):
            assert str(section.model_fields[key].default).removesuffix(".0") == value, (kind, key)


def test_the_page_tells_which_variant_goes_where() -> None:
    """Yes in the table is a recipe that loads, no is one that is refused."""
    table = read_table("Variant")
    variants = {v for m in (LoraMethod, QloraMethod) for v in get_args(m.model_fields["variant"].annotation)}
    assert table.keys() == variants
    for variant, (_, lora, qlora, artifact) in table.items():
        assert (lora == "yes") is (variant in get_args(LoraMethod.model_fields["variant"].annotation))
        assert (qlora == "yes") is (variant in get_args(QloraMethod.model_fields["variant"].annotation))
        assert (artifact == "rank 2r") is (variant in CHANGING_THE_BASE)


def test_the_pages_rates_are_those_of_the_code() -> None:
    """Defaults and ranges are written once, here and there alike."""
    (table,) = re.findall(r"\| Method \| Default .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE)
    told = {}
    for line in table.splitlines():
        kind, default, usual, _ = (c.strip().strip("`") for c in line.strip("|").split("|"))
        low, high = usual.split(" to ")
        told[kind] = (float(default), (float(low), float(high)))
    methods = {get_args(m.model_fields["type"].annotation)[0]: m for m in get_args(get_args(Method)[0])}
    assert told == {kind: (method.rate, method.usual_rates) for kind, method in methods.items()}
    assert all(low <= rate <= high for rate, (low, high) in told.values())
