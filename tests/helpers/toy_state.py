"""A small model with dropout and AdamW and its closed list of state, for the tests of snapshots and
checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from repsft_fast.state import RunState


class Toy:
    """Trains on data drawn from torch's global stream, with dropout: every mutable part of a run in a few
    kilobytes."""

    def __init__(self, seed: int = 0, hidden: int = 16):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Dropout(0.3), nn.Linear(hidden, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        # the first step would allocate these: the closed list is constant from the start
        for p in self.model.parameters():
            self.optimizer.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.update = 0
        self.losses: list[float] = []
        self.state = RunState()
        self.state.add_tensors("model", lambda: dict(self.model.named_parameters()))
        self.state.add_tensors("optimizer", self._moments)
        self.state.add_value("update", lambda: self.update, self._set_update)
        self.state.add_value("losses", lambda: list(self.losses), lambda v: setattr(self, "losses", list(v)))
        self.state.add_rng()

    def _moments(self):
        names = {p: n for n, p in self.model.named_parameters()}
        return {
            f"{names[p]}/{key}": t for p, state in self.optimizer.state.items() for key, t in state.items()
        }

    def _set_update(self, value: int) -> None:
        self.update = value

    def step(self, n: int = 1) -> list[float]:
        for _ in range(n):
            x = torch.randn(8, 4)
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.update += 1
            self.losses.append(loss.item())
        return self.losses[-n:]

    def restore(self, pool, name: str) -> None:
        self.state.load_values(pool.restore(name))
