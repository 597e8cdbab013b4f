"""The law of the resume for recipes that nobody thought of: keys drawn together, killed at random, the same bytes."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from test_resume import draw_moment, finish, kill
from test_training import COLOURS, write_job
from tiny import make_recipe, write_base
from warm import Warm

from appliance.example import Example, Message
from appliance.method import VIRTUAL_TOKENS, FullMethod, LoraMethod, Method, PrefixTuningMethod
from appliance.model import load_template
from appliance.recipe import EwcSection
from appliance.training import TrainingJob, prepare_rows

VARIANTS = ("plain", "rslora", "dora", "gaussian", "orthogonal", "olora")
LEVERS = ("attention", "head", "lora", "norm", "prefix")
SYSTEM = Message("system", "You name the colours of things, in one word, and say nothing else at all.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def draw_examples(rng: random.Random, count: int, *, system: bool, start: int = 0) -> list[Example]:
    """Conversations of one to three exchanges, of differing lengths; with one system prompt, or none."""
    examples = []
    for number in range(start, start + count):
        colour, turns = rng.choice(COLOURS), [SYSTEM] if system else []
        for exchange in range(rng.choice((1, 1, 1, 2, 3))):
            asked = f"{colour} {'very ' * rng.randint(0, 6)}thing {number} {exchange}"
            turns += [Message("user", asked), Message("assistant", colour)]
        examples.append(Example(f"r{number}", tuple(turns), provenance="program"))
    return examples


def draw_method(rng: random.Random) -> dict[str, Any]:
    """Any method with any of its keys."""
    kind = rng.choice(("lora", "lora", "qlora", "qlora", "prompt-tuning", "prefix-tuning", "p-tuning", "ia3", "full"))
    size = {"tokens": rng.randint(1, 12)}
    if kind in ("lora", "qlora"):
        variant = rng.choice((*VARIANTS, *(("pissa", "mica") if kind == "lora" else ("loftq",))))
        targets = rng.choice(("all-linear", "all-linear", ["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"]))
        size = {"rank": rng.choice((2, 4, 8)), "alpha": rng.choice((None, None, 1, 7))}
        return {"type": kind, "variant": variant, "dropout": rng.choice((0.0, 0.0, 0.1)), "targets": targets, **size}
    if kind == "prompt-tuning":
        return {"type": kind, "init": rng.choice(("vocabulary", "random")), **size}
    if kind == "prefix-tuning":
        projection = rng.choice(("none", "mlp"))
        return {"type": kind, "init": rng.choice(("zero", "random")), "projection": projection, **size}
    if kind == "p-tuning":
        return {"type": kind, "encoder": rng.choice(("mlp", "lstm")), "hidden": 16, **size}
    return {"type": kind}


def draw_training(rng: random.Random, *, can_pack: bool, rates: tuple[float, ...]) -> dict[str, Any]:
    """Every key of the section; from one checkpoint in the whole run to one after each step."""
    return {
        "epochs": rng.choice((0.7, 1, 2, 2.5, 4)),
        "learning_rate": rng.choice(rates),
        "effective_batch": rng.choice((3, 4, 8, 8, 12)),
        "max_length": 512,
        "packing": rng.choice(("auto", True, False) if can_pack else ("auto", False)),
        "schedule": rng.choice(("cosine", "linear", "constant")),
        "warmup_ratio": rng.choice((0.0, 0.1, 0.5)),
        "weight_decay": rng.choice((0.0, 0.1)),
        "max_grad_norm": rng.choice((0.1, 1.0, 100.0)),
        "seed": rng.randint(0, 9),
        "precision": rng.choice(("auto", "bf16", "fp32")),
        "checkpoints": rng.choice((1, 2, 5, 12, 40)),
        "keep": rng.choice(("last", "best_loss", "best_exact_match")),
        "patience": rng.choice((None, 1, 2, 3)),
        "speed": {lever: "standard" for lever in LEVERS if rng.random() < 0.2},
    }


def takes_penalty(method: Method) -> bool:
    """Whether EWC knows the update of this method."""
    return isinstance(method, FullMethod) or (
        isinstance(method, LoraMethod) and method.variant in ("plain", "rslora", "gaussian", "orthogonal")
    )


def draw_job(base: Path, folder: Path, rng: random.Random) -> TrainingJob:
    """A job on disk: one device or two, any micro-batch, with or without validation rows and a penalty."""
    chosen = draw_method(rng)
    method = make_recipe(method=chosen).method
    rates = (1e-3,) if isinstance(method, FullMethod) else (1e-3, 1e-2, 3e-2)
    training = draw_training(rng, can_pack=not isinstance(method, VIRTUAL_TOKENS), rates=rates)
    recipe = make_recipe(method=chosen, training=training)
    devices = 2 if rng.random() < 0.15 and training["effective_batch"] % 2 == 0 else 1
    share = training["effective_batch"] // devices
    penalised = takes_penalty(method) and rng.random() < 0.3
    count, held_out = rng.randint(10, 40), rng.choice((0, 2, 6))
    examples = draw_examples(rng, count + held_out, system=rng.random() < 0.6)
    sides = {"train": examples[:count], "validation": examples[count:]}
    sides |= {"general": draw_examples(rng, 8, system=False, start=1000)} if penalised else {}
    for side, rows in sides.items():
        prepare_rows(rows, template=load_template(base), max_length=512, file=folder / f"{side}.rows.jsonl")
    job = TrainingJob(
        folder=folder,
        adapter=folder / "adapter",
        base=base,
        base_name="tiny",
        method=method,
        training=recipe.training,
        ewc=EwcSection(rows=8, strength=rng.choice((1.0, 300.0))) if penalised else None,
        micro_batch=rng.choice([m for m in range(1, share + 1) if share % m == 0]),
        devices=devices,
        checkpointing=rng.random() < 0.25 and not isinstance(method, PrefixTuningMethod),
        threads=1,
        fingerprint={"run_key": "k"},
    )
    write_job(job)
    return job


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_kills_change_no_byte_whatever_the_recipe_says(warm: Warm, base: Path, tmp_path: Path, seed: int) -> None:
    """One to four SIGKILLs at random moments of a random job end with the bytes of the run that had none."""
    whole = finish(warm, draw_job(base, tmp_path / "whole", random.Random(seed)))
    job = draw_job(base, tmp_path / "killed", rng := random.Random(seed))
    for _ in range(rng.randint(1, 4)):
        assert kill(warm, job, draw_moment(rng)) in (-signal.SIGKILL, 0)
    assert finish(warm, job) == whole
