"""Laws of the card: one JSON truth, three renderings that say the same, and nothing in it can break out."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from test_registry import make_folder, make_manifest, publish_new
from test_verdict import make_results, pairs
from tiny import make_recipe

from appliance import registry
from appliance.cli.list import command as list_command
from appliance.cli.show import command as show_command
from appliance.digest import digest_bytes
from appliance.errors import ApplianceError
from appliance.evaluation import judge
from appliance.recipe import GateSection
from appliance.registry.layout import blob_key
from appliance.report import build_card, render_html, render_markdown, say_reasons, write_card
from appliance.report.plots import Plot, _log_ticks, render_png
from appliance.report.words import list_facts
from appliance.store import Store, open_store
from appliance.training.arguments import build_adapter_arguments

MARKED = re.compile(r"<mark>(.*?)</mark>", re.DOTALL)
GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "<script>alert('x')</script>|`*_[](javascript:1)\n# \"&amp;"


def make_card(*, champion: bool = False, **changes: Any) -> dict[str, Any]:
    """The card of an imagined run with round numbers."""
    ours, theirs = pairs(both=10, wins=70, losses=2, neither=38)
    arms = {"zero_shot": [0.0] * 120, "few_shot": theirs, "candidate": ours}
    if champion:
        arms["champion"] = theirs
    verdict = judge(make_results(arms), metric="exact_match", gates=GateSection())
    values: dict[str, Any] = {
        "recipe": make_recipe(),
        "run_key": "ab" * 32,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "created_at": "2026-01-31T12:00:00Z",
        "base": {"model": "./base", "revision": "sha256:" + "cd" * 32},
        "data": {
            "name": "colours", "licence": "Apache-2.0", "rows": 1200, "train": 960, "validation": 120, "test": 120,
            "digest": "ef" * 32, "split_digest": "12" * 32, "provenance": {"human": 1000, "program": 200},
            "system_prompt": "Name the colour |\n of the <thing>.",
        },
        "training": {
            "learning_rate": 2e-4, "effective_batch": 8, "trainable_parameters": 4_884_480,
            "total_parameters": 139_400_064, "steps": 4, "tokens": 12_000, "tokens_computed": 9_000,
            "trained_tokens": 3_000, "seconds": 80.0,
            "tokens_per_second": 150.0, "first_loss": 2.5, "last_loss": 0.125, "best_validation_loss": 0.25,
            "last_validation_loss": 0.25, "device": "cpu", "dtype": "bf16", "peak_memory_bytes": 2**30,
            "micro_batch": 8, "predicted": {"peak_memory_bytes": 3 * 2**29, "micro_batch": 8},
            "adapter_sha256": "34" * 32, "stopped_by": "max_steps", "kept": "best_loss", "kept_step": 2,
            "levers": {
                "rows": "padded", "attention": "standard", "head": "labelled", "lora": "fused", "norm": "fused",
                "prefix": "standard", "compile": False,
            },
            "kept_validation_loss": 0.25, "kept_validation_exact_match": 0.75,
            "alerts": [{"step": 4, "kind": "overfitting", "words": "validation loss <rose>", "numbers": {}}],
            "thinking": "off", "switch": "enable_thinking",
            "rows": {
                "train": {"rows": 960, "token_rows": 961, "split": ["r2"], "dropped": ["r9"]},
                "validation": {"rows": 120, "token_rows": 120, "split": [], "dropped": []},
                "test": {"rows": 120, "token_rows": 120, "split": [], "dropped": []},
            },
            "masks": [
                {"id": "r1", "tokens": 6, "trained": 2, "pieces": [
                    ["<|user|>", False, True], ["red thing\n", False, False], ["<|assistant|>", False, True],
                    ["red", True, False], ["<|end|>", True, True]]},
                {"id": "r2", "part": "1 of 2", "tokens": 900, "trained": 2, "pieces": [
                    ["<|user|>", False, True], ["x" * 700, False, False], ["blue", True, False],
                    ["<|end|>", True, True], ["<|user|>b?", False, False], ["red", True, False],
                    ["<|end|>", True, True]]},
            ],
        },
        "metrics": [
            *({"step": s, "epoch": s / 2, "loss": 2.5 / s, "learning_rate": 2e-4 / s, "grad_norm": 1 / s, "tokens": 9,
               "tokens_per_second": 150.0 + s}
              for s in range(1, 5)),
            {"step": 2, "epoch": 1.0, "validation_loss": 0.25, "validation_exact_match": 0.75},
            {"step": 4, "epoch": 2.0, "validation_loss": 0.5, "validation_exact_match": 0.5},
        ],
        "evaluation": {"four_bit": False},
        "verdict": verdict.to_json(),
        "versions": {"appliance": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip
    return build_card(**{**values, **changes})


class _Page(HTMLParser):
    """Collects tags and attributes, and that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(html: str) -> _Page:
    """The parsed page; fails when tags are not balanced."""
    page = _Page()
    page.feed(html)
    assert page.open == []
    return page


@pytest.mark.parametrize("name", ["card.md", "card.html"])
def test_the_card_is_as_it_was_last_looked_at(name: str) -> None:
    """Golden files, written anew with UPDATE_GOLDEN=1 and then looked at by a person."""
    text = {"card.md": render_markdown, "card.html": render_html}[name](make_card(champion=True))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def test_reasons_name_the_arms_as_the_table_does() -> None:
    """No `few_shot` beside `base, few-shot`; in the page, in Markdown and in what the command line prints."""
    card = make_card(champion=True)
    shown = say_reasons(card["verdict"]["reasons"])
    assert "points against base, few-shot (95%" in shown[0]
    assert "points against version in use (95%" in shown[1]
    for text in (render_html(card), render_markdown(card)):
        assert "few_shot" not in text.replace("\\", "")
        assert "against base, few-shot" in text


def test_an_alpha_that_is_left_out_is_the_one_that_was_trained_with() -> None:
    """Twice the rank, as the adapter's configuration says; what another method leaves out has no row."""
    recipe = make_recipe(method={"type": "lora", "rank": 12})
    alpha = build_adapter_arguments(recipe.method)["lora_alpha"]
    assert list_facts(make_card(recipe=recipe))["Method"]["alpha"] == str(alpha) == "24"
    given = make_recipe(method={"type": "lora", "rank": 12, "alpha": 5})
    assert list_facts(make_card(recipe=given))["Method"]["alpha"] == "5"
    prefix = list_facts(make_card(recipe=make_recipe(method={"type": "prefix-tuning"})))["Method"]
    assert "hidden" not in prefix
    assert "alpha" not in prefix


def test_rows_in_groups_are_told_above_the_scores() -> None:
    """Who reads how many rows were tested reads how many are independent; earlier cards have no number of them."""
    card = make_card()
    for groups, title in (
        (30, "120 held-out test rows in 30 groups"),
        (120, "120 held-out test rows"),
        (None, "120 held"),
    ):
        verdict = card["verdict"]
        known = {k: v for k, v in verdict["comparison"].items() if k != "groups"}
        told = {**card, "verdict": {**verdict, "comparison": known | ({"groups": groups} if groups else {})}}
        assert f"<h2>{title}" in render_html(told)
        assert f"## {title}" in render_markdown(told)


def test_the_verdict_is_a_sentence() -> None:
    """What stands after the full stop begins with a capital."""
    assert re.search(r"\*\*Verdict: ship\.\*\* [A-Z]", render_markdown(make_card()))


def test_the_page_is_whole_and_needs_nobody() -> None:
    """Balanced tags, no script, no request to anywhere."""
    page = read_page(render_html(make_card()))
    assert "script" not in page.tags
    assert not [v for k, v in page.attributes if k in ("src", "href", "onclick")]
    assert page.tags.count("polyline") >= 4
    assert "Ship: better than the prompted base model" in page.text


def test_hostile_names_stay_text() -> None:
    """Names, categories and rows come from people; none can become markup or leave its cell."""
    card = make_card(
        data={**make_card()["data"], "name": HOSTILE, "licence": HOSTILE},
        versions={HOSTILE: HOSTILE},
        git_commit=HOSTILE,
    )
    card["verdict"]["slices"] = {HOSTILE: card["verdict"]["slices"]["a"]}
    card["training"]["masks"] = [{"id": HOSTILE, "tokens": 2, "trained": 1, "pieces": [[HOSTILE, True, False]] * 2}]
    card["training"]["rows"]["train"]["dropped"] = [HOSTILE]
    page = read_page(render_html(card))
    assert "script" not in page.tags
    assert "alert('x')" in page.text
    markdown = render_markdown(card)
    assert "<script>" not in markdown.split("---\n", 2)[2]
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_the_front_matter_is_yaml_for_hubs() -> None:
    """A hub reads base, library and result from the head of the file."""
    _, front, _ = render_markdown(make_card()).split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "peft"
    assert values["model-index"][0]["results"][0]["metrics"] == [{"type": "exact_match", "value": 0.6667}]


@pytest.mark.parametrize(
    ("more", "memory", "time"),
    [
        ({}, "1.00 GiB; the plan said 1.50 GiB", "150 tokens/s"),
        ({"micro_batch": 2}, "1.00 GiB; the plan said 1.50 GiB with micro-batch 8, it was 2", "150 tokens/s"),
        ({"predicted": None}, "1.00 GiB", "150 tokens/s"),
        ({"mfu": 0.4123}, "1.00 GiB; the plan said 1.50 GiB", "150 tokens/s, MFU 41.2%"),
    ],
    ids=["as planned", "smaller after out of memory", "a version from before", "on a known device"],
)
def test_what_was_predicted_stands_beside_what_was_measured(more: dict[str, Any], memory: str, time: str) -> None:
    """Memory with the plan's word and the micro-batch it was about, speed with MFU; old records tell less."""
    card = make_card()
    card["training"] |= more
    facts = list_facts(card)["Training"]
    assert facts["peak memory"] == memory
    assert facts["time"] == f"80 s, {time}"


def test_numbers_are_the_same_in_all_three(tmp_path: Path) -> None:
    """What JSON says is what both renderings show."""
    card = make_card()
    write_card(card, tmp_path)
    assert json.loads((tmp_path / "card.json").read_text()) == card
    markdown, page = (tmp_path / "card.md").read_text(), read_page((tmp_path / "card.html").read_text()).text
    for arm in card["verdict"]["arms"].values():
        shown = f"{arm['score'] * 100:.1f}%"
        assert shown in markdown
        assert shown in page


def test_each_plot_is_a_png_too_and_equal_plots_have_equal_bytes(tmp_path: Path) -> None:
    """The images lie beside the card, have words in them wherever they are made, and repeat byte for byte."""
    write_card(make_card(), tmp_path / "a")
    write_card(make_card(), tmp_path / "b")
    images = sorted((tmp_path / "a").glob("*.png"))
    assert [i.stem for i in images] == ["exact-match", "gradient-norm", "learning-rate", "loss", "speed"]
    for image in images:
        data = image.read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        assert struct.unpack(">2I", data[16:24]) == (960, 648)
        assert data == (tmp_path / "b" / image.name).read_bytes()
    plot = Plot("p", "Loss", {"training": [(1.0, 1.0), (2.0, 2.0)]})
    assert render_png(plot) != render_png(replace(plot, label="Lost")), "text is drawn without system fonts"


def test_a_missing_renderer_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment from before the renderer gets a message, not a traceback."""
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ApplianceError, match=r"in its clone: `uv pip install '\.\[train\]'`$"):
        render_png(Plot("p", "Loss", {"training": [(1.0, 1.0)]}))


def test_the_page_tells_the_kept_step_and_the_alerts() -> None:
    """What the monitors said stands above the plots and in the summary, and the kept step is marked."""
    card = make_card()
    page = render_html(card)
    assert "kept: step 2" in page
    assert "validation loss &lt;rose&gt;" in page
    assert "best validation loss" in page
    assert "## During training" in render_markdown(card)


@pytest.mark.parametrize(("low", "high"), [(-3.2, 1.4), (0.1, 0.2), (-0.7, 0.4), (2.0, 2.0 + 1e-6)])
def test_a_logarithmic_axis_has_round_numbers_on_it(low: float, high: float) -> None:
    """At least two ticks within the axis, and no more than fit."""
    ticks = _log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


def test_the_mask_on_the_page_is_the_mask() -> None:
    """What is marked is what is trained, row by row; control tokens are told from text that looks like one."""
    card = make_card()
    card["training"]["masks"][0]["pieces"][1] = ["<|end|>", False, False]
    html = render_html(card)
    marked = [re.sub("<[^>]+>", "", m).replace("&lt;", "<").replace("&gt;", ">") for m in MARKED.findall(html)]
    assert marked == ["marked", "red<|end|>", "blue<|end|>", "red<|end|>"]
    assert html.count("<span class='tok'>&lt;|end|&gt;</span>") == 3
    assert "[... 100 characters ...]" in html


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"thinking": "off", "switch": "thinking"}, "off; serve with thinking: false"),
        ({"thinking": "on", "switch": "enable_thinking"}, "on; serve with enable_thinking: true"),
        ({"thinking": "off", "switch": ""}, "off"),
        ({"thinking": "off"}, "off; serve with enable_thinking: false"),  # a card of an earlier release
        ({"thinking": "fixed", "switch": ""}, None),
    ],
)
def test_the_card_names_what_a_server_must_be_given(told: dict[str, str], said: str | None) -> None:
    """The template's own variable, and nothing where it has none."""
    card = make_card()
    card["training"] = {k: v for k, v in card["training"].items() if k not in ("thinking", "switch")} | told
    assert list_facts(card)["Mask"].get("thinking") == said


def test_a_card_with_little_in_it_is_still_a_card() -> None:
    """No categories, no curves, no commit: sections are left out, nothing breaks."""
    card = make_card(metrics=[], git_commit=None)
    card["verdict"]["slices"] = {}
    card["training"] |= {"masks": [], "rows": {}}
    assert "By category" not in read_page(render_html(card)).text
    assert "By category" not in render_markdown(card)


@pytest.mark.parametrize("outcome", ["ship", "hold"])
@pytest.mark.parametrize("commit", ["b" * 40, None])
def test_a_card_fetches_the_version_that_it_is_of(tmp_path: Path, outcome: str, commit: str | None) -> None:
    """Who copies its commands never gets what the alias is at by then, before or after it moved."""
    card = make_card(git_commit=commit)
    card["verdict"]["outcome"] = outcome
    store = open_store((tmp_path / "store").as_uri())
    facts = {"name": card["name"], "created_at": card["created_at"], "git_commit": commit, "verdict": outcome}
    version = publish_new(store, tmp_path, "own", **facts)
    newer = publish_new(store, tmp_path, "newer", name=card["name"], created_at="2026-02-01T00:00:00Z")
    registry.promote(
        store, name=card["name"], version=newer, alias="production", actor="ci", reason="verdict ship", at="now"
    )
    for text in (render_markdown(card), read_page(render_html(card)).text):
        (reference,) = re.findall(r"^appliance pull (\S+) \./colours$", text, re.MULTILINE)
        assert registry.resolve(store, reference)[0] == version


def publish_card(store: Store, folder: Path, card: dict[str, Any] | bytes) -> str:
    """A held version of `demo` with this card; the version."""
    made = make_folder(folder)
    (made / "card" / "card.json").write_bytes(card if isinstance(card, bytes) else json.dumps(card).encode())
    metrics = {"metric": "exact_match", "n": 120, "arms": {"candidate": 0.667, "zero_shot": 0.0}}
    return registry.publish(
        store, manifest=make_manifest(made, verdict="hold", metrics=metrics, base=BASE), folder=made
    )


BASE = {"model": "tiny", "revision": "sha256:1"}


def show(store: Store, version: str) -> str:
    """What `appliance show` says."""
    done = CliRunner().invoke(show_command, [f"demo@{version}", "--store", store.url], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_show_says_why_with_intervals_and_categories(tmp_path: Path) -> None:
    """The reasons of the card, each arm's interval, and each category."""
    store, card = open_store((tmp_path / "store").as_uri()), make_card()
    card["verdict"]["slices"] = {
        "heating": {a: {"n": 7, "score": s} for a, s in (("candidate", 0.5), ("zero_shot", 0.25))}
    }
    said = show(store, publish_card(store, tmp_path / "made", card))
    for reason in say_reasons(card["verdict"]["reasons"]):
        assert reason in said
    low, high = card["verdict"]["arms"]["candidate"]["interval"]
    assert f"candidate  exact_match 0.667 on 120 rows, 95% interval {low * 100:.1f} to {high * 100:.1f}%" in said
    assert "heating: candidate 0.500, zero_shot 0.250 on 7 rows" in said


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", "lost", "altered"])
def test_show_says_what_it_can_without_a_card(tmp_path: Path, damage: bytes | str) -> None:
    """The manifest is told all the same; a lost or altered blob is named."""
    store = open_store((tmp_path / "store").as_uri())
    version = publish_card(store, tmp_path / "made", damage if isinstance(damage, bytes) else make_card())
    if isinstance(damage, str):
        files = {e.path: e.sha256 for e in registry.load_manifest(store, "demo", version).files}
        store.delete(blob_key(files["card/card.json"]))
        if damage == "altered":
            store.put(blob_key(files["card/card.json"]), b"{}")
    said = show(store, version)
    assert "verdict    hold" in said
    assert "candidate  exact_match 0.667 on 120 rows" in said
    assert ("no reasons: " in said) == isinstance(damage, str)


def publish_pair(store: Store, folder: Path) -> tuple[str, str]:
    """Two versions of `demo`: the newer one of more data, another rank and another torch."""
    older = {"recipe": {"method": {"type": "lora", "rank": 8, "alpha": None}}, "versions": {"torch": "2.11"}}
    newer = {"recipe": {"method": {"type": "lora", "rank": 16, "alpha": 4}}, "versions": {"torch": "2.13"}}
    newer |= {"data_digest": "d" * 64, "split_digest": "e" * 64, "git_commit": "b" * 40, "training": {"steps": 9}}
    newer |= {"created_at": "2026-02-01T00:00:00Z", "verdict": "hold"}
    scores = ({"zero_shot": 0.1, "few_shot": 0.25, "candidate": 0.5}, {"zero_shot": 0.1, "candidate": 0.625})
    first, second = (
        publish_new(store, folder, str(n), **facts, metrics={"metric": "exact_match", "n": 120, "arms": arms})
        for n, (facts, arms) in enumerate(zip((older, newer), scores, strict=True))
    )
    return first, second


def test_show_against_a_version_tells_what_differs_and_nothing_else(tmp_path: Path) -> None:
    """Older first, by the recipe's own keys; where the rows differ, that scores are no comparison and what is."""
    store = open_store((tmp_path / "store").as_uri())
    older, newer = publish_pair(store, tmp_path / "made")
    arguments = ["--against", f"demo@{older}", "--store", store.url]
    done = CliRunner().invoke(show_command, [f"demo@{newer}", *arguments], catch_exceptions=False)
    told = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()[1:]}
    assert done.stdout.startswith(f"demo@{older} -> demo@{newer}\n")
    assert told == {
        "verdict": "ship -> hold",
        "score.candidate": "0.500 -> 0.625",
        "score.few_shot": "0.250 -> -",
        "data": f"{digest_bytes(b'data')[:12]} -> dddddddddddd",
        "commit": "aaaaaaaaaaaa -> bbbbbbbbbbbb",
        "recipe.method.rank": "8 -> 16",
        "recipe.method.alpha": "- -> 4",
        "training.steps": "- -> 9",
        "versions.torch": "2.11 -> 2.13",
    }
    assert "appliance data diff aaaaaaaaaaaa..bbbbbbbbbbbb" in done.stderr
    assert "scores are of other test rows" in done.stderr
    same = CliRunner().invoke(show_command, [f"demo@{older}", *arguments], catch_exceptions=False)
    assert same.stdout.splitlines()[1:] == ["nothing differs"]
    assert not same.stderr
    machine = CliRunner().invoke(show_command, [f"demo@{newer}", *arguments, "--json"], catch_exceptions=False)
    assert json.loads(machine.stdout)["differences"]["recipe.method.rank"] == ["8", "16"]


def test_list_tells_each_versions_score_beside_the_best_prompt(tmp_path: Path) -> None:
    """In columns; a version that tells no scores is listed all the same."""
    store = open_store((tmp_path / "store").as_uri())
    publish_pair(store, tmp_path / "made")
    publish_new(store, tmp_path / "made", "bare", created_at="2026-03-01T00:00:00Z")
    done = CliRunner().invoke(list_command, ["--store", store.url], catch_exceptions=False)
    first, second, bare = done.stdout.splitlines()
    assert first.endswith("  ship          exact_match 0.500, base 0.250")
    assert second.endswith("  hold          exact_match 0.625, base 0.100")
    assert bare.endswith("  ship")
    machine = CliRunner().invoke(list_command, ["--store", store.url, "--json"], catch_exceptions=False)
    assert [(v["created_at"], v["commit"]) for v in json.loads(machine.stdout)][1] == ("2026-02-01T00:00:00Z", "b" * 40)
