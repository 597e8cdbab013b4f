"""Laws of fused norms: the values and derivatives of the model's own class, or the class itself."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_silent_failures import ARCHITECTURES, MIXING, build_architecture
from tiny import write_base
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from appliance.training import attention
from appliance.training.norms import fuse_norms

WIDTH = 96
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    id="cuda",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def randomise(model: torch.nn.Module) -> None:
    """Weights of norms are all one, or all zero, in a new model: nothing would show in them."""
    torch.manual_seed(7)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and name.endswith("weight"):
            torch.nn.init.normal_(weight, mean=0.8, std=0.3)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXING])
def test_a_model_with_fused_norms_has_its_loss_and_gradients(base: Path, name: str) -> None:
    """Of every weight, norms' own among them, whatever the class calls them and wherever it has them."""
    model = build_architecture(base, name)
    attention.use_standard(model)
    randomise(model)
    fused = deepcopy(model)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert fuse_norms(fused) == len(norms), "each of them, so that memory is as planned"
    assert bool(norms) == (name not in ("Cohere", "StableLm"))
    ids = torch.arange(3, 45).view(2, 21)
    losses = [m(input_ids=ids, labels=ids, use_cache=False).loss for m in (model, fused)]
    for loss in losses:
        loss.backward()
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-5)
    found = dict(fused.named_parameters())
    for weight, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[weight].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=weight)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("stream", "weight"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_a_norm_is_rounded_as_its_class_rounds(
    kind: Any, stream: torch.dtype, weight: torch.dtype, *, autocast: bool, device: str
) -> None:
    """The same type of result; values and derivatives at most a rounding apart, where the stream is tiny too."""
    own = kind(WIDTH, eps=1e-5).to(device, weight)
    randomise(own)
    fused = deepcopy(own)
    assert fuse_norms(torch.nn.ModuleList([fused])) == 1
    sizes = torch.tensor([1e-4, 1e-2, 1.0, 300.0], device=device)[:, None]
    x = (torch.randn(2, 4, WIDTH, device=device) * sizes).to(stream)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        results = [norm(i) for norm, i in zip((own, fused), inputs, strict=True)]
    assert results[1].dtype == results[0].dtype
    limit = 2 * torch.finfo(stream).eps if stream == torch.bfloat16 else 1e-5
    torch.testing.assert_close(results[1], results[0], rtol=limit, atol=1e-6)
    dy = torch.randn_like(results[0])
    for y in results:
        y.backward(dy)
    for found, wanted in ((inputs[1].grad, inputs[0].grad), (fused.weight.grad, own.weight.grad)):
        assert found is not None
        assert wanted is not None
        assert found.dtype == wanted.dtype
        assert float((found - wanted).float().norm()) <= 2 * limit * float(wanted.float().norm())


def test_llamas_norm_is_not_changed_in_a_bit_on_a_cpu() -> None:
    """In bf16, where the adapter is trained: what is served by another program is what was trained with."""
    own = LlamaRMSNorm(576).to(torch.bfloat16)
    randomise(own)
    fused = deepcopy(own)
    fuse_norms(torch.nn.ModuleList([fused]))
    x = torch.randn(4, 32, 576).to(torch.bfloat16)
    differing = float((own(x) != fused(x)).float().mean())
    assert differing <= 1e-3, "only where a sum in another order tips a rounding"


class TwiceRMSNorm(LlamaRMSNorm):
    """Not what it is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the norm."""
        return 2 * super().forward(x)


class NoEpsilonRMSNorm(LlamaRMSNorm):
    """It has an epsilon, and computes without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm, infinite at zero."""
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))).to(x.dtype)


@pytest.mark.parametrize("kind", [TwiceRMSNorm, NoEpsilonRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_computes_something_else_keeps_its_own(kind: Any, dtype: torch.dtype) -> None:
    """Asked with small values too, where an epsilon shows."""
    norm = kind(WIDTH).to(dtype)
    randomise(norm)
    x = torch.randn(3, WIDTH, dtype=dtype)
    wanted = norm(x)
    assert fuse_norms(torch.nn.ModuleList([norm])) == 0
    assert torch.equal(norm(x), wanted)
    assert "forward" not in vars(norm)
