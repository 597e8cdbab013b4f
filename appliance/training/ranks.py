"""One training run on several devices of a host: a process each, the same weights, a share of every step's rows.

Each process (rank) runs the whole program on the same rows in the same order, and computes its share of
every micro-batch. What they tell each other is here: gradients are added up once a step, in fp32 and in one
order, so that a resumed run adds as the run before it did; what is counted is added up; what must be the
same everywhere is compared. A run on one device goes through the same lines, and nothing is sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from appliance.errors import TrainingError

_PATIENCE = timedelta(hours=1)  # while the first one saves a checkpoint, the others wait
_BUCKET = 1 << 26  # values added up at a time: 256 MiB


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size`; the `rank` 0 leads: it alone writes and speaks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_lead(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def take_share(self, rows: Sequence[Any]) -> list[Any]:
        """The rows that this rank computes; none where there are fewer rows than ranks."""
        return list(rows[self.rank :: self.size])

    def take_filled_share(self, rows: Sequence[Any]) -> list[Any]:
        """As `take_share`, filled up with the first row to what the first rank has: all compute as many batches."""
        share = self.take_share(rows)
        return [*share, *rows[: -(-len(rows) // self.size) - len(share)]]

    def take_even_share(self, rows: Sequence[Any], *, length: Callable[[Any], int]) -> list[Any]:
        """As `take_share`, no more rows, but each rank about as many tokens: a step waits for its longest share.

        Longest row first, each to the rank that has the fewest tokens yet (Graham 1969, longest processing time).
        """
        shares: list[list[Any]] = [[] for _ in range(self.size)]
        most = -(-len(rows) // self.size)
        for row in sorted(rows, key=length, reverse=True):
            min((s for s in shares if len(s) < most), key=lambda s: sum(map(length, s))).append(row)
        return shares[self.rank]

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Each `.grad` becomes the sum over the ranks; a rank that had no rows adds zeros.

        One that no rank has is left `None`: an optimizer passes over it, where it decays a weight with a gradient of
        zeros. Those of weights that are shared out are sums already, see `sharding`.
        """
        if self.size == 1:
            return
        for bucket in _fill_buckets([p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            has_one = torch.tensor([float(p.grad is not None) for p in bucket], device=self.device)
            flat = torch.cat([*(g.flatten().float() for g in gradients), has_one])
            distributed.all_reduce(flat)
            *parts, ranks = flat.split([*(g.numel() for g in gradients), len(bucket)])
            for p, gradient, part, reached in zip(bucket, gradients, parts, ranks.tolist(), strict=True):
                p.grad = gradient.copy_(part.view_as(gradient)) if reached else None

    def add_up(self, *counts: Any) -> list[int]:
        """The sums of whole numbers over the ranks."""
        if self.size == 1:
            return [int(c) for c in counts]
        numbers = torch.tensor([int(c) for c in counts], dtype=torch.int64, device=self.device)
        distributed.all_reduce(numbers)
        return [int(n) for n in numbers.tolist()]

    def add_up_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The sum of a loss over the ranks."""
        if self.size == 1:
            return loss
        total = loss.detach().to(torch.float32, copy=True)
        distributed.all_reduce(total)
        return total

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """What each rank made of its share of some rows, in the order of the rows."""
        if self.size == 1:
            return list(values)
        shares: list[Any] = [None] * self.size
        distributed.all_gather_object(shares, list(values))
        merged: list[Any] = [None] * sum(len(s) for s in shares)
        for rank, share in enumerate(shares):
            merged[rank :: self.size] = share
        return merged

    def follow_lead(self, decide: Callable[[], Any]) -> Any:
        """What the first rank decides; the others wait for it."""
        if self.size == 1:
            return decide()
        said = [decide() if self.is_lead else None]
        distributed.broadcast_object_list(said, src=0)
        return said[0]

    def is_any(self, flag: bool) -> bool:
        """Whether it is so for one of the ranks."""
        return self.add_up(flag) != [0]

    def take_turns(self, work: Callable[[], Any]) -> Any:
        """Do the same work on every rank, the first one first: what it leaves on disk, the others find."""
        if not self.is_lead:
            self.add_up(0)  # returns when the first one is there too
        done = work()
        if self.is_lead:
            self.add_up(0)
        return done

    def one_by_one(self, work: Callable[[], Any]) -> Any:
        """Do the same work on every rank, never on two at a time: what it takes of the host, one takes."""
        done = None
        for rank in range(self.size):
            if rank == self.rank:
                done = work()
            self.add_up(0)
        return done

    def build_mesh(self) -> DeviceMesh:
        """All ranks in a row, as torch's sharding wants to know them."""
        return init_device_mesh(self.device.type, (self.size,))

    def name_file(self, name: str) -> str:
        """The first rank's files have their own names; the others' are told apart, and read by nobody but people."""
        return name if self.is_lead else f"rank-{self.rank}-{name}"

    def part(self) -> None:
        """Nothing is sent any more."""
        if self.size > 1:
            distributed.destroy_process_group()

    def require_same_weights(self, model: Any) -> None:
        """Refuse to go on where the ranks' trained weights differ in a bit. Raises `TrainingError`."""
        if self.size > 1:
            self.require_same(_add_up_bits(model), "their weights")

    def require_same(self, number: int, what: str) -> None:
        """Refuse to go on where ranks differ in `what`, which the number stands for. Raises `TrainingError`."""
        reduced = number % (1 << 48)
        if self.add_up(reduced) != [reduced * self.size]:
            raise TrainingError(
                f"the devices of this run differ in {what}; run the same command to go on, and report it"
            )

    @contextlib.contextmanager
    def draw_own(self, seed: int, *place: int) -> Iterator[None]:
        """Random numbers of this rank alone, by seed and place; what all ranks draw alike is not touched."""
        if self.size == 1:
            yield
            return
        named = hashlib.sha256(repr((seed, *place, self.rank)).encode()).digest()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(named[:7], "big"))
            yield


def join_ranks(meeting: Path | None, rank: int, size: int, device: torch.device) -> Ranks:
    """This process as one of `size`, which meet by the file `meeting`, new for each start; a single one needs none."""
    if size > 1:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")  # they are on one host, which may have no other network
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
        )
    return Ranks(rank, size, device)


def _add_up_bits(model: Any) -> int:
    """The bits of all that is trained and whole, as whole numbers: equal weights, equal sums."""
    views = {2: torch.int16, 4: torch.int32}
    trained = (p.detach() for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor))
    return sum(int(p.view(views[p.element_size()]).sum(dtype=torch.int64)) for p in trained)


def _fill_buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters in order, as many at a time as a bucket holds, at least one."""
    bucket: list[torch.nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if bucket and held + parameter.numel() > _BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += parameter.numel()
    if bucket:
        yield bucket
