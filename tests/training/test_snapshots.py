"""How much pinned host memory snapshots may take, and that a machine of 128 GiB keeps what a run of 0.6B to
4B asks of it."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import SnapshotError
from repsft_fast.snapshot import plan_slots
from repsft_fast.snapshot.slots import Layout
from repsft_fast.training import snapshots
from repsft_fast.training.build import build
from repsft_fast.training.snapshots import Snapshots, closed_list, free_host_bytes, pinned_budget
from tests.helpers import runs
from tests.snapshot.test_buffers import MODELS, elements

GIB = 1 << 30
GPU = torch.device("cuda", 0)


def machine(root, available=None, **files):
    """Files of /proc and /sys below `root`; of `files` the names have / for every __."""
    if available is not None:
        files["proc__meminfo"] = f"MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(root, folder, most, used, unused=0, *, version=2):
    names = {2: ("memory.max", "memory.current", "inactive_file"),
             1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}[version]  # fmt: skip
    top = root / "sys/fs/cgroup" / ("memory" if version == 1 else "") / folder
    top.mkdir(parents=True, exist_ok=True)
    (top / names[0]).write_text(f"{most}\n")
    (top / names[1]).write_text(f"{used}\n")
    (top / "memory.stat").write_text(f"anon 5\n{names[2]} {unused}\n")


class TestFreeHostBytes:
    def test_of_the_machine(self, tmp_path):
        assert free_host_bytes(machine(tmp_path, 100 * GIB)) == 100 * GIB
        assert free_host_bytes(tmp_path / "nothing there") == 4 * GIB

    @pytest.mark.parametrize("version", [1, 2])
    def test_of_the_container_or_job_where_that_is_less(self, tmp_path, version):
        line = {1: "4:memory:/slurm/job_1\n3:cpuset:/\n", 2: "0::/slurm/job_1\n"}[version]
        root = machine(tmp_path, 100 * GIB, proc__self__cgroup=line)
        group(root, "slurm/job_1", "max" if version == 2 else 1 << 62, 3 * GIB, version=version)
        assert free_host_bytes(root) == 100 * GIB
        group(root, "slurm", 50 * GIB, 12 * GIB, 2 * GIB, version=version)
        assert free_host_bytes(root) == 40 * GIB, "the limit around it counts too"
        group(root, "slurm/job_1", 30 * GIB, 21 * GIB, GIB, version=version)
        assert free_host_bytes(root) == 10 * GIB
        group(root, "slurm/job_1", 30 * GIB, 31 * GIB, version=version)
        assert free_host_bytes(root) == 0

    def test_in_a_container_whose_group_is_the_top(self, tmp_path):
        root = machine(tmp_path, 100 * GIB, proc__self__cgroup="0::/not/seen/from/inside\n")
        group(root, "", 16 * GIB, 6 * GIB)
        assert free_host_bytes(root) == 10 * GIB

    def test_files_that_say_something_else_are_no_limit(self, tmp_path):
        root = machine(
            tmp_path, 8 * GIB, proc__self__cgroup="0::/\n", sys__fs__cgroup__memory__max="all of it"
        )
        assert free_host_bytes(root) == 8 * GIB


@pytest.mark.parametrize(("given", "device", "ranks", "budget"), [
    (None, GPU, 1, 60 * GIB), (None, GPU, 4, 15 * GIB), (None, GPU, 16, 60 * GIB // 8), (7, GPU, 1, 7), (0, GPU, 1, 0),
    (None, torch.device("cpu"), 1, 0), (5, torch.device("cpu"), 1, 5),
])  # fmt: skip
def test_the_budget_is_as_set_or_a_ranks_share_of_half_of_what_is_free(
    monkeypatch, given, device, ranks, budget
):
    monkeypatch.setattr(snapshots, "free_host_bytes", lambda: 120 * GIB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert pinned_budget(given, World(0, ranks, 0, device)) == budget


@pytest.mark.parametrize(
    ("model", "copies", "fits"),
    [
        ("SmolLM2-135M", 3, True),
        ("Qwen3-0.6B", 3, True),
        ("SmolLM2-1.7B", 2, True),
        ("Qwen3-4B", 1, True),
        ("Qwen3-4B", 2, False),
    ],
)
def test_a_machine_of_128_gib_keeps_what_is_asked_or_says_so(monkeypatch, model, copies, fits):
    """AdamW's state in fp32: one copy for checkpoints, two with numbers.on_nonfinite: revert. 120 GiB of it
    are free."""
    monkeypatch.setattr(snapshots, "free_host_bytes", lambda: 120 * GIB)
    with FakeTensorMode():
        layout = Layout([torch.empty(n, device=GPU) for _ in range(3) for n in elements(*MODELS[model])])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    budgets = {
        "device_bytes": 0,
        "pinned_bytes": pinned_budget(None, World(0, 1, 0, GPU)),
        "pinned_each": layout.pinned_each,
    }
    if fits:
        assert plan_slots(layout.bytes_each, copies, **budgets).pinned == copies
    else:
        with pytest.raises(SnapshotError, match=rf"hold 1 of {copies} snapshots"):
            plan_slots(layout.bytes_each, copies, **budgets)


def test_what_a_pool_has_to_say_is_told(tmp_path, monkeypatch):
    parts = build(Config.of(runs.settings(tmp_path, snapshot__pinned_bytes="1GiB")))
    kept = Snapshots(parts, closed_list(parts), 1, weights_only=False)
    assert kept.messages == [
        "snapshot tier pinned is off: the state is in host memory already; raise the device budget instead"
    ]
    kept.close()
    silent = parts.config.snapshot.model_copy(update={"pinned_bytes": None})
    monkeypatch.setattr(parts, "config", parts.config.model_copy(update={"snapshot": silent}))
    kept = Snapshots(parts, closed_list(parts), 1, weights_only=False)
    assert kept.messages == [], "nothing was asked for, so nothing is missing"
    kept.close()


def test_what_was_read_from_disk_for_a_checkpoint_goes_with_it(tmp_path):
    """A second copy of every kept snapshot, in page-locked memory on a GPU, would else stay to the end."""
    only_disk = {"snapshot__device_bytes": 0, "snapshot__pinned_bytes": 0, "snapshot__disk_bytes": "64MiB"}
    parts = build(Config.of(runs.settings(tmp_path, **only_disk)))
    kept = Snapshots(parts, closed_list(parts), 1, weights_only=False)
    kept.take("one")
    held = kept.freeze(copy=False)
    copies = [weakref.ref(t) for name, t in held.tensors.items() if name.startswith("moments/one/")]
    assert copies
    assert all(copy() is not None for copy in copies)
    held.release()
    assert not any(copy() is not None for copy in copies)
    kept.close()


def test_a_snapshot_without_a_place_waits_for_the_reader_that_holds_one(tmp_path):
    parts = build(Config.of(runs.settings(tmp_path)))
    kept = Snapshots(parts, closed_list(parts), 1, weights_only=False)
    kept.take("one")
    held = kept.freeze(copy=False)
    waited = []

    class Reads:
        def wait(self) -> None:
            waited.append(True)
            held.release()

    held.reader = Reads()
    kept.release("one")
    kept.take("two")
    assert waited == [True]
    assert kept.names() == ["two"]
    kept.close()
