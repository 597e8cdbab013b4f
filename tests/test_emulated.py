"""Laws of the emulated CUDA device: what a GPU would refuse it refuses, what it holds it counts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.cuda), reason="`make emulated-test`"),
]


def test_values_of_two_places_do_not_mix_but_for_a_number() -> None:
    """The fault that only a GPU finds; a single number of the host is taken, as there."""
    here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
    for mix in (
        lambda: here + there,
        lambda: there @ here,
        lambda: torch.cat([here, there]),
        lambda: torch.nn.functional.embedding(torch.zeros(2, dtype=torch.long), there),
        lambda: torch.where(here > 0, there, there),
        lambda: here[torch.zeros(1, dtype=torch.long, device="cuda")],
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert (there * torch.tensor(2.0)).sum().item() == 18.0
    assert there[torch.tensor([0, 2])].shape == (2, 3), "indices of the host are taken too"


def test_a_view_is_of_its_tensors_memory() -> None:
    """What is written through one is seen in the other, whoever made the view."""
    whole = torch.zeros(2, 6, device="cuda")
    for number, view in enumerate((whole[1], whole.t()[2:4], whole.view(3, 4), whole.as_strided((2,), (5,))), 1):
        before = torch.cuda.memory_allocated()
        view.add_(number)
        assert whole.sum().item() > 0
        whole.zero_()
        assert view.abs().sum().item() == 0
        assert torch.cuda.memory_allocated() == before


def test_gradients_and_optimizers_are_the_hosts_own() -> None:
    """Forward, backward and a fused step end with the same bytes, and in CUDA's autocast it is bf16 that multiplies."""
    ends = []
    for place in ("cpu", "cuda"):
        torch.manual_seed(1)
        layer, x = torch.nn.Linear(8, 8).to(place), torch.randn(4, 8).to(place)
        with torch.autocast(place, torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
        assert layer.weight.device.type == place
        ends.append(layer.weight.detach().cpu())
    assert torch.equal(*ends)


def test_what_is_saved_comes_back_where_it_is_asked_for() -> None:
    """With what shares memory in it."""
    whole = torch.arange(6.0, device="cuda")
    file = io.BytesIO()
    torch.save({"whole": whole, "part": whole[2:]}, file)
    for place in ("cuda", "cpu"):
        file.seek(0)
        found = torch.load(file, map_location=place, weights_only=True)
        assert found["whole"].device.type == found["part"].device.type == place
        found["whole"][3] = -1.0
        assert found["part"].tolist() == [2.0, -1.0, 4.0, 5.0]


def test_memory_is_counted_and_refused() -> None:
    """In pieces of 512 bytes as torch's allocator has them; beyond the limit with torch's own error."""
    before = torch.cuda.memory_allocated()
    held = [torch.empty(1000, dtype=torch.uint8, device="cuda") for _ in range(3)]
    assert torch.cuda.memory_allocated() - before == 3 * 1024
    del held
    assert torch.cuda.memory_allocated() == before
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + (1 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(2 << 20, dtype=torch.uint8, device="cuda")
        assert torch.zeros(1 << 19, dtype=torch.uint8, device="cuda").sum().item() == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(0.0)


HOLDING = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512)).to("cuda")
x = torch.randn(1024, 512, device="cuda")
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(2):
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
    some = torch.cat([y.float().softmax(-1), x.new_zeros(1024, 1)], -1)
    some.index_select(0, torch.arange(9, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
"""


def test_the_same_bytes_are_held_without_values() -> None:
    """Where only shapes are asked for nothing large is computed, and every byte is counted as where all is."""
    held = [
        subprocess.check_output([sys.executable, "-c", HOLDING], env=os.environ | {"EMULATED_CUDA": kind}, text=True)
        for kind in ("", "shapes")
    ]
    assert held[0] == held[1]
    assert int(held[0].split()[1]) > 40 << 20


@pytest.mark.parametrize("job", ["1b-lora", "1b-full", "8b-qlora"])
def test_the_plan_tells_what_training_holds_at_real_sizes(job: str) -> None:
    """Within 5% of the tensors that the trainer holds at its peak, with what CUDA takes for itself."""
    argv = [sys.executable, "benchmarks/memory.py", "--run", job, "appliance"]
    said = subprocess.check_output(argv, env=os.environ | {"EMULATED_CUDA": "shapes"}, text=True)
    figure = json.loads(said.splitlines()[-1])
    assert abs(figure["off"]) <= 0.05, figure
