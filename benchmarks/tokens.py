"""What the token cache saves: rendering, masking and checking chat rows against reading them back.

    python benchmarks/tokens.py                # 20,000 rows of 2 to 6 turns, the tokenizer of SmolLM2
    python benchmarks/tokens.py --rows 2000    # a look

It prints seconds and bytes. Without `--base`, the demo's base model is made in `.cache/appliance`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from appliance.example import Example, Message
from appliance.model import load_template, resolve_base
from appliance.recipe import load_recipe
from appliance.training import TokenCache, prepare_rows

ROOT = Path(__file__).parent.parent
WORDS = ("cancel", "the", "order", "of", "blue", "shoes", "and", "send", "me", "a", "receipt", "by", "Friday", "please")


def main() -> None:
    """Time the preparation of the same rows without a cache, into an empty one, and from a full one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--base", type=Path, help="a folder with a tokenizer and a chat template")
    options = parser.parse_args()
    examples, template = build_chats(options.rows), load_template(options.base or fetch_base())
    with tempfile.TemporaryDirectory() as folder:
        cache = TokenCache(Path(folder) / "tokens", note=print)
        for name, kept in (("without", None), ("first", cache), ("again", cache)):
            began = time.monotonic()
            rows = prepare_rows(examples, template=template, max_length=4096, file=Path(folder) / name, cache=kept)
            seconds = time.monotonic() - began
            tokens = sum(len(r.input_ids) for r in rows)
            print(f"{name:<8} {seconds:7.2f} s  {len(rows):,} rows, {tokens:,} tokens", flush=True)
        size = sum(f.stat().st_size for f in cache.folder.iterdir())
        print(f"entry    {size / 2**20:7.1f} MiB")


def build_chats(count: int) -> list[Example]:
    """Seeded conversations of one to three exchanges, some with system text."""
    source = random.Random(5)

    def say(least: int, most: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(source.randint(least, most)))

    chats = []
    for number in range(count):
        lead = [Message("system", say(10, 30))] if source.random() < 0.5 else []
        turns = [Message(r, say(5, 60)) for _ in range(source.randint(1, 3)) for r in ("user", "assistant")]
        chats.append(Example(f"r{number}", (*lead, *turns), provenance="program"))  # type: ignore[arg-type]
    return chats


def fetch_base() -> Path:
    """The demo's base model."""
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    return resolve_base(recipe.base, root=ROOT, cache=ROOT / ".cache" / "appliance", note=print).folder


if __name__ == "__main__":
    main()
