"""Laws of what is tried before anything is spent: an evaluation that cannot be made stops a run before its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from families import FAMILIES, call, make_example, write_family
from test_mask_view import write_project
from tiny import make_recipe, write_tokenizer

from appliance.cli import appliance
from appliance.data import select_side
from appliance.errors import EvaluationError, TrainingError
from appliance.evaluation import rehearse_prompts
from appliance.example import Message
from appliance.model import ChatTemplate, load_template, render_rows
from appliance.pipeline import train_alone
from appliance.plan import Plan, build_plan, read_machine
from appliance.preparation import Origin, Workspace, prepare
from appliance.recipe import EvaluationSection, load_recipe
from appliance.run import Run

BY_NAME = {f.name: f for f in FAMILIES}
BEST = "Answer with the colour, one word."
NO_SYSTEM = """{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] +
'<|im_end|>\n<|im_start|>assistant\n' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>\n' }}{% endif
%}{% endfor %}"""


def go(verb: str, file: Path, *more: str) -> Result:
    """A verb on a project, in this process."""
    root = str(file.parent)
    given = [verb, *more, str(file)] if verb != "data" else ["data", "check", "--recipe", str(file)]
    return CliRunner().invoke(appliance, [*given, "--root", root, "--cache", f"{root}/cache"])


def rewrite(file: Path, **sections: dict[str, Any]) -> None:
    """Change keys of a recipe's sections."""
    recipe = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(recipe | {n: {**recipe.get(n, {}), **s} for n, s in sections.items()}))


@pytest.mark.parametrize("verb", ["plan", "data", "train"])
def test_a_system_prompt_that_the_template_refuses_stops_before_the_training(tmp_path: Path, verb: str) -> None:
    """The rows are innocent, and the message says whose fault it is."""
    file = write_project(tmp_path, family="gemma2", max_length=512)
    rewrite(file, evaluation={"system_prompt": BEST})
    done = go(verb, file)
    said = str(done.exception) + done.output
    assert "the prompts of zero_shot: the chat template refused a conversation: System role not supported" in said
    assert "leave out evaluation.system_prompt" in said
    assert not list(tmp_path.rglob("metrics.jsonl"))


def load(tmp_path: Path, template: str) -> ChatTemplate:
    """The tiny tokenizer under this template."""
    write_tokenizer(tmp_path / "base", template=template)
    return load_template(tmp_path / "base")


def test_a_system_prompt_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    """Else the base would be asked without its best prompt, and be easy to beat. The rows' own prompts are sound."""
    template = load(tmp_path, NO_SYSTEM)
    row = make_example(("user", "red thing"), ("assistant", "red"))
    assert render_rows(row, template)
    assert rehearse_prompts(EvaluationSection(few_shot=0), test=[row], train=[row], template=template) > 0
    with pytest.raises(EvaluationError, match=r"^evaluation\.system_prompt: the chat template of .* leaves it out"):
        rehearse_prompts(EvaluationSection(few_shot=0, system_prompt=BEST), test=[row], train=[row], template=template)


def test_demonstrations_that_the_template_refuses_are_named(tmp_path: Path) -> None:
    """Mistral's wants turns to alternate, and a call without its result is followed by the next demonstration."""
    write_family(tmp_path, BY_NAME["mistral-v0.3"])
    template = load_template(tmp_path)
    row = make_example(("user", "weather?"), Message("assistant", "", [call("Paris")]), tools=True)
    assert render_rows(row, template)
    with pytest.raises(EvaluationError, match=r"the prompts of few_shot: .*; write evaluation\.few_shot: 0"):
        rehearse_prompts(EvaluationSection(few_shot=1), test=[row], train=[row], template=template)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two-turn rows of up to some hundred tokens and a base made for 2,048."""
    return write_project(tmp_path, family="smollm2", max_length=512)


def narrow(file: Path, context: int, *, table: bool) -> None:
    """Let the base be made for that many tokens, by a table of positions or by its configuration alone."""
    from safetensors.torch import load_file, save_file

    place = file.parent / "base" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"max_position_embeddings": context}))
    if table:
        weights = load_file(place.parent / "model.safetensors")
        weights["model.wpe.weight"] = next(iter(weights.values())).new_zeros(context, 64)
        save_file(weights, place.parent / "model.safetensors", metadata={"format": "pt"})


def test_rows_beyond_what_the_base_was_made_for_are_told_or_refused(project: Path) -> None:
    """Rotary positions go on, unproven; where positions are a table there are no more."""
    assert "was made for" not in go("plan", project).output
    narrow(project, 100, table=False)
    told = " ".join(go("plan", project).output.split())
    assert "warning: the longest row has" in told
    assert "and the base was made for 100 (its config.json): what it learns there may not hold" in told
    narrow(project, 100, table=True)
    with pytest.raises(TrainingError, match=r"row has 101 tokens, and the base was made for 100 .*, and there are no"):
        plan_rows(project, longest=101)


def test_rows_that_are_not_trained_on_need_positions_too(project: Path) -> None:
    """A validation row, or one of the Fisher, that a table has no position for would end the training child."""
    recipe = load_recipe(project)
    file = project.parent / recipe.dataset.path / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sides = {select_side(f"group:{g}", recipe.dataset.split): str(g) for g in range(100)}
    rows[0] |= {"group": sides["validation"]}
    rows[0]["messages"][0]["content"] += " please" * 100
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    rewrite(project, training={"max_length": 1024}, evaluation={"few_shot": 0})
    narrow(project, 700, table=True)
    with pytest.raises(TrainingError, match=r"longest validation row has 8\d\d tokens, .* 700 .*, and there are no"):
        raise go("plan", project).exception or AssertionError
    rewrite(project, training={"max_length": 700, "overlong": "drop"})
    assert go("plan", project).exit_code == 0, "left out whole, as the message says"
    with pytest.raises(TrainingError, match="longest row has 701 tokens"):
        plan_rows(project, longest=50, longest_beside=701)


def plan_rows(project: Path, *, longest: int, longest_beside: int = 0, **changes: Any) -> Plan:
    """The plan of one row of that length, and another that is not trained on."""
    facts = {"trained_tokens": 9, "validation_rows": 1, "base": project.parent / "base", "machine": read_machine()}
    return build_plan(make_recipe(**changes), lengths=[longest], longest_beside=longest_beside, **facts)


def test_virtual_tokens_take_positions(project: Path) -> None:
    """Rows that fit alone may not fit behind them."""
    assert not [w for w in plan_rows(project, longest=2040).warnings if "made for" in w]
    plan = plan_rows(project, longest=2040, method={"type": "prompt-tuning", "tokens": 9})
    (told,) = [w for w in plan.warnings if "made for" in w]
    assert told.startswith("the longest row has 2040 tokens and 9 virtual ones, and the base was made for 2048")


def test_prompts_beyond_what_the_base_was_made_for_are_told_or_refused(project: Path) -> None:
    """The longest prompt with demonstrations, and the answer behind it."""
    rewrite(project, evaluation={"few_shot": 3, "max_new_tokens": 300})
    narrow(project, 512, table=False)
    told = " ".join(go("plan", project).output.split())
    assert "warning: evaluation: the longest prompt has" in told
    assert "more than the 512 that ./base was made for: answers there count for little" in told
    narrow(project, 512, table=True)
    with pytest.raises(EvaluationError, match=r"more than the 512 .*; write a smaller evaluation\.few_shot"):
        raise go("plan", project).exception or AssertionError


def test_needs_that_changed_are_planned_anew_until_a_checkpoint_binds_them(tmp_path: Path) -> None:
    """They take no part in the run key, and a run that began to train goes on as it began."""
    file = write_project(tmp_path, family="smollm2", max_length=512, epochs=1)
    notes: list[str] = []
    workspace = Workspace(tmp_path, tmp_path / "cache", tmp_path / "runs", note=notes.append)
    origin = Origin(commit=None, time="2026-01-01T00:00:00Z", actor="x")

    def train() -> Run:
        prepared = prepare(load_recipe(file), workspace=workspace)
        return train_alone(prepared, workspace=workspace, origin=origin, choices={})

    run = train()
    record = run.read("prepare")
    run.finish("prepare", **record)  # as if it had not trained yet
    rewrite(file, needs={"devices": 2})
    assert train().read("train")["summary"]["devices"] == 2
    assert run.read("prepare")["needs"]["devices"] == 2
    run.finish("prepare", **run.read("prepare"))
    (run.training / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    rewrite(file, needs={"devices": 1})
    notes.clear()
    train()
    assert run.read("prepare")["needs"]["devices"] == 2
    assert any("goes on with the needs that it began with; delete it to change them" in n for n in notes)
