"""Snapshots: the closed list of state kept in memory within a run, put back bit for bit.

take      live tensors ──copy──▶ slot of the fastest tier        restore   slot ──copy──▶ live tensors
tiers     device ──side stream──▶ pinned host ──thread──▶ disk   the coldest moves on when a tier is full
"""

from repsft_fast.snapshot.pool import SnapshotPool
from repsft_fast.snapshot.slots import SlotPlan, plan_slots

__all__ = ["SlotPlan", "SnapshotPool", "plan_slots"]
