"""The recipe: every fault at once, with its line; equal meaning, equal digest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

import appliance.method
import appliance.recipe
from appliance.desired import find_recipes
from appliance.digest import digest_json
from appliance.errors import RecipeError
from appliance.method import Method
from appliance.recipe import Recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
GOOD = "name: a\nbase: {model: ./base}\ndataset: {path: datasets/a}\nmethod: {type: lora}\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_fits_the_schema(path: Path) -> None:
    """A shipped recipe loads, and the JSON Schema that editors use accepts it."""
    assert load_recipe(path).name
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads((ROOT / "docs/recipe.schema.json").read_text()))


def test_there_is_a_recipe_for_each_method() -> None:
    """The examples cover every type that a recipe can name."""
    types = {m.model_fields["type"].annotation for m in get_args(get_args(Method)[0])}
    assert {load_recipe(p).method.type for p in RECIPES} == {t for kind in types for t in get_args(kind)}


def test_the_demo_recipe_at_the_top_is_the_packaged_one() -> None:
    """The repository is the template: its demo recipe is the one that `appliance demo` runs."""
    assert (ROOT / "recipes/demo.yaml").read_bytes() == (ROOT / "appliance/demo/recipe.yaml").read_bytes()


def test_all_faults_are_reported_at_once_with_their_lines() -> None:
    """A person mends a file once, not once per fault."""
    text = (
        "name: A b\nbase: {model: ./base}\ndataset: {path: d}\n"
        "method:\n  type: lora\n  rnak: 3\n  rank: 0\ntraning: {}\n"
    )
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="r.yaml")
    lines = sorted(str(caught.value).splitlines())
    assert [line.split(": ")[0] for line in lines] == ["r.yaml:1", "r.yaml:6", "r.yaml:7", "r.yaml:8"]
    assert "unknown key method.rnak; did you mean rank?" in lines[1]
    assert "did you mean training?" in lines[3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1: found nothing, expected keys such as name"),
        ("- a\n", "r.yaml:1: found a list, expected keys such as name"),
        ("name: [\n", "r.yaml:2"),
        ("name: a\n---\nname: b\n", "r.yaml:2: a second document begins here, and a file is one; remove the `---`"),
        (GOOD + "name: b\n", "r.yaml:5: key name is given twice"),
        (GOOD.replace("./base", "''"), "r.yaml:2: base.model: found '', expected text; write some"),
        (GOOD.replace("./base", "owner/model"), "r.yaml:2: base.revision: a hub model needs 'revision'"),
        (
            GOOD.replace("base: {model: ./base}", "base:\n  model: owner/model\n  revision: main"),
            "r.yaml:4: base.revision: found 'main': no commit, and a name moves; write its 40-digit commit",
        ),
        (GOOD.replace("./base", "owner/model"), "`git ls-remote https://huggingface.co/owner/model HEAD` shows it"),
        (GOOD.replace("type: lora", "rank: 8"), "r.yaml:4: key method.type is missing; use one of lora, qlora"),
        (GOOD.replace("lora", "lroa"), "r.yaml:4: method.type: found 'lroa', which is no method; did you mean lora?"),
        (GOOD.replace("lora", "magic"), "which is no method; use one of lora, qlora"),
        (GOOD.replace("{type: lora}", "lora"), "r.yaml:4: method: found 'lora', expected keys below it, such as type"),
        (GOOD.replace("name: a", "name: A b"), "expected lower-case letters, digits and '-', at most 63, such as my-"),
        (
            GOOD + "publish: {alias: Prod}\n",
            "r.yaml:5: publish.alias: found 'Prod', expected a letter, then lower-case",
        ),
        (GOOD + "training: {effective_batch: 2.5}\n", "found 2.5, expected a whole number; left out, it is 16"),
        (GOOD + "training: {epochs: 0}\n", "found 0, expected a value greater than 0; left out, it is 3.0"),
        (
            GOOD.replace("lora", "dora"),
            "found 'dora', which is no method; it is a variant: write type: lora and variant: dora",
        ),
        (GOOD + "training: {lr: 0.1}\n", "unknown key training.lr; did you mean learning_rate?"),
        (GOOD + "training: {overlong: dorp}\n", "expected 'refuse' or 'drop'; did you mean drop?"),
        (GOOD + "training: {packing: maybe}\n", "training.packing: found 'maybe', expected true or false"),
        (GOOD + "training:\n", "r.yaml:5: training: found nothing, expected keys below it, such as epochs"),
        (
            GOOD.replace("{type: lora}", "{type: lora, targets: 3}"),
            "r.yaml:4: method.targets: found 3, expected a list",
        ),
        (GOOD.replace("method: {type: lora}", ""), "key method is missing"),
        (GOOD + "training: {learning_rate: .nan}\n", "r.yaml:5: training.learning_rate"),
        (GOOD + "training: {epochs: many}\n", "found 'many'"),
    ],
)
def test_a_bad_recipe_is_one_message_with_a_place(text: str, expected: str) -> None:
    """Whatever is wrong, the message starts with file and line."""
    with pytest.raises(RecipeError, match=r"^r\.yaml:\d+") as caught:
        parse_recipe(text, source="r.yaml")
    assert expected in str(caught.value)


def test_a_missing_file_names_the_path_and_the_next_action(tmp_path: Path) -> None:
    """A recipe that is not there is no traceback."""
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_a_missing_recipe_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    """Names of files that exist, here or in recipes/, a close one first; never an example that may not be there."""
    (tmp_path / "recipes").mkdir()
    for name in ("tickets", "invoices"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"no such file or directory; did you mean .*/recipes/tickets\.yaml\?$"):
        load_recipe(tmp_path / "tickts.yaml")
    with pytest.raises(RecipeError, match=r"; there is .*/recipes/invoices\.yaml, .*/recipes/tickets\.yaml$"):
        load_recipe(tmp_path / "recipes" / "x.yaml")
    for number in range(9):
        (tmp_path / "recipes" / f"part-{number}.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"part-6\.yaml and 3 more$"):
        load_recipe(tmp_path / "recipes" / "x.yaml")
    for number in range(9):
        (tmp_path / "recipes" / f"part-{number}.yaml").unlink()
    (tmp_path / "prices.yaml").write_text("")
    with pytest.raises(
        RecipeError, match=r"directory; there is [^,]*/recipes/invoices\.yaml, [^,]*/recipes/tickets\.yaml$"
    ):
        load_recipe(tmp_path / "recipes")
    with pytest.raises(RecipeError, match=r"recipes: cannot be read, is a directory; there is .*invoices\.yaml"):
        load_recipe(tmp_path / "recipes")
    with pytest.raises(RecipeError, match=r"; give the path of a recipe, a \*\.yaml$"):
        load_recipe(tmp_path / "none" / "x.yaml")


@pytest.mark.parametrize("value", ["x y", "1.5", "[]", "{a: b}", ""])
def test_no_value_is_met_with_a_librarys_words(value: str) -> None:
    """Whatever is written for a key, the message names the key, what was found and what was expected."""
    sections = {
        "TrainingSection": "training: {{{}: {}}}",
        "GateSection": "evaluation: {{gates: {{{}: {}}}}}",
        "LoraMethod": "method: {{type: lora, {}: {}}}",
    }
    for section, form in sections.items():
        for key in Recipe.model_json_schema()["$defs"][section]["properties"].keys() - {"type"}:
            text = GOOD.replace("method: {type: lora}\n", "") if section == "LoraMethod" else GOOD
            try:
                parse_recipe(text + form.format(key, value) + "\n", source="r.yaml")
            except RecipeError as fault:
                for line in str(fault).splitlines():
                    assert re.match(r"r\.yaml:\d: (unknown key )?[a-z_.]+[:;] ", line), line
                    assert "Input" not in line


def test_a_truth_is_no_number() -> None:
    """`true` for a key that is a number is refused, whichever section it is in: it had been taken as 1."""
    refused = set()
    for name, schema in Recipe.model_json_schema()["$defs"].items():
        section = getattr(appliance.recipe, name, None) or getattr(appliance.method, name)
        for key, form in schema["properties"].items():
            kinds = {f.get("type") for f in (form, *form.get("anyOf", ()))} & {"integer", "number"}
            for value in (True, False) if kinds else ():
                with pytest.raises(ValidationError) as caught:
                    section.model_validate({key: value})
                assert ((key,), f"{'int' if 'integer' in kinds else 'float'}_type") in {
                    (e["loc"], e["type"]) for e in caught.value.errors()
                }
                refused.add(key)
    assert {"rank", "epochs", "patience", "alpha", "test", "share", "devices"} <= refused
    with pytest.raises(
        RecipeError, match=r"^r\.yaml:4: method\.rank: found True, expected a whole number; left out, it"
    ):
        parse_recipe(GOOD.replace("lora}", "lora, rank: true}"), source="r.yaml")


def test_comments_order_and_spelled_out_defaults_do_not_change_the_digest() -> None:
    """A digest is of meaning, so reformatting a recipe retrains nothing."""
    other = "# note\nmethod:\n  rank: 16\n  type: lora\ndataset: {path: datasets/a}\nbase: {model: ./base}\nname: a\n"
    assert parse_recipe(GOOD, source="a").digest == parse_recipe(other, source="b").digest
    changed = parse_recipe(GOOD.replace("lora}", "lora, rank: 8}"), source="c")
    assert changed.digest != parse_recipe(GOOD, source="a").digest


@pytest.mark.parametrize(
    "given",
    [
        {"training": {"speed": {"prefix": "standard"}}},
        {"training": {"speed": {"norm": "standard"}}},
        {"evaluation": {"gates": {"champion_margin": 0.05}}},
    ],
    ids=["prefix", "norm", "champion_margin"],
)
def test_a_key_younger_than_a_recipe_does_not_change_its_digest(given: dict[str, Any]) -> None:
    """A release that adds one retrains nobody; a recipe that gives it is another recipe."""
    recipe = parse_recipe(GOOD, source="a")
    values = recipe.model_dump(mode="json", exclude={"needs", "forgetting"})
    del values["training"]["speed"]["prefix"], values["training"]["speed"]["norm"]
    del values["evaluation"]["gates"]["champion_margin"]
    assert recipe.digest == digest_json(values)
    assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_none=True) | given).digest != recipe.digest


@pytest.mark.parametrize("only", ["tickets", "tickets.yaml", "recipes/tickets.yaml", "./recipes/tickets.yaml"])
def test_a_recipe_is_chosen_by_its_name_or_its_path(tmp_path: Path, only: str) -> None:
    """`--only` takes what other verbs take."""
    (tmp_path / "recipes").mkdir()
    for name in ("tickets", "v1.2"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(GOOD)
    assert [p.stem for p in find_recipes(tmp_path, only=(only,))] == ["tickets"]
    assert [p.stem for p in find_recipes(tmp_path, only=("v1.2",))] == ["v1.2"]
