"""Where a test of this folder runs: one body serves the GPU, with full sizes, and this machine, with small
ones.

    @anywhere("snapshot")                          def test_…(place): …
    @by_dtype("row kernel", on="interpreter")      def test_…(place, dtype): …

Every variant says what it proves; those for the GPU are marked `gpu`. The others run with every `make test`:
on plain CPU tensors, or through Triton's interpreter, which truncates to bf16 where the hardware rounds and
so gets no bf16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

OPERATIONS = (
    "head", "row kernel", "kept rows", "adamw", "adamw8bit", "attention",
    "state hash", "snapshot", "train step", "checkpoint", "compile", "graphs",
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32", "any")
INTERPRETED = (
    "csrc_triton.cross_entropy",
    "csrc_triton.judge",
    "csrc_triton.kept_rows",
    "csrc_triton.token_sums",
    "csrc_triton.adamw",
    "csrc_triton.adamw8bit",
    "csrc_triton.adamw8bit_count",
    "csrc_triton.tensor_table",
    "csrc_triton.state_hash",
)


@dataclass(frozen=True)
class Place:
    """kind: cuda, cpu, or interpreter (CPU tensors, kernels interpreted)."""

    kind: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.kind == "cuda" else "cpu")

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"

    def pick(self, here, there):
        """A size that this machine can compute, or the one that the GPU is asked for."""
        return there if self.on_gpu else here

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def anywhere(*operations: str, dtype: str = "any", on: str | None = "cpu") -> Callable:
    """`place`: the GPU, and `on` here; None = nothing of it can run here."""
    proves = _proves(operations, dtype)
    params = [pytest.param(on, marks=proves, id=on)] if on else []
    return pytest.mark.parametrize(
        "place", [*params, pytest.param("cuda", marks=[pytest.mark.gpu, *proves])], indirect=True
    )


def by_dtype(
    *operations: str,
    there: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32),
    here: Sequence[torch.dtype] = (torch.float32, torch.float16),
    on: str = "cpu",
) -> Callable:
    """`place` and `dtype`: every one of `there` on the GPU, of `here` on this machine."""
    params = [
        pytest.param(on, dtype, marks=_proves(operations, name_of(dtype)), id=f"{on}-{name_of(dtype)}")
        for dtype in here
    ]
    for dtype in there:
        marks = [pytest.mark.gpu, *_proves(operations, name_of(dtype))]
        params.append(pytest.param("cuda", dtype, marks=marks, id=f"cuda-{name_of(dtype)}"))
    return pytest.mark.parametrize(("place", "dtype"), params, indirect=["place"])


def _proves(operations: Sequence[str], dtype: str) -> list:
    return [pytest.mark.proves(operation, dtype) for operation in operations]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Law3:
    """Law 3 over outputs that come in pieces: RMS error against float64 at most `factor` × that of plain
    torch, plus a floor.

    Elements of which plain torch makes no finite number (1 − p of a memorised token) are held to a relative
    2e-5.
    """

    FLOOR = 1e-9  # of the truth's own RMS, where plain torch happens to be exact

    def __init__(self, *, at_least: int = 10_000):
        self.at_least = at_least
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._allowed: dict[str, tuple[float, float]] = {}

    def add(
        self,
        name: str,
        ours: torch.Tensor,
        plain: torch.Tensor,
        truth: torch.Tensor,
        factor: float = 1.5,
        floor: float = FLOOR,
    ) -> None:
        assert ours.shape == plain.shape == truth.shape
        assert truth.dtype == torch.float64
        usable = plain.isfinite()
        if not usable.all():
            left = ours[~usable].double(), truth[~usable]
            torch.testing.assert_close(*left, rtol=2e-5, atol=0.0, msg=lambda told: f"{name}: {told}")
        parts = (ours.double() - truth, plain.double() - truth, truth)
        squares = [torch.where(usable, part, 0.0).square().sum() for part in parts]
        self._sums.setdefault(name, []).append(torch.stack([*squares, usable.sum().double()]))
        self._allowed[name] = (factor, floor)

    def ratios(self) -> dict[str, tuple[float, float]]:
        """Of every output its RMS error and what is allowed."""
        found = {}
        for name, figures in self._sums.items():
            own, theirs, size, count = torch.stack(figures).sum(0).tolist()
            factor, floor = self._allowed[name]
            found[name] = (
                (own / count) ** 0.5,
                factor * (theirs / count) ** 0.5 + floor * (size / count) ** 0.5,
            )
            assert count >= self.at_least, (
                f"{name}: {count:g} elements are too few for a root of the mean square"
            )
        return found

    def hold(self) -> None:
        ratios = self.ratios()
        assert ratios
        wrong = [
            f"{name} {error:.3g}, allowed {most:.3g}"
            for name, (error, most) in ratios.items()
            if not error <= most
        ]
        assert not wrong, "RMS error of " + "; ".join(wrong)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN included; b may be on another device."""
    b = b.to(a.device)
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


def poison_pool(device: torch.device) -> None:
    """Fill what the caching allocator will hand out next with bytes 255, a NaN in every floating type;
    nothing on a CPU.

    Small blocks too, so that holes beside live tensors are filled: the allocator hands out the smallest that
    fits.
    """
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    # by bytes
    counts = {1 << 24: 8, 1 << 20: 32, 1 << 18: 32, 1 << 16: 64, 1 << 14: 64, 1 << 12: 128, 1 << 9: 512}
    blocks = [
        torch.full((size,), 255, dtype=torch.uint8, device=device)
        for size, n in counts.items()
        for _ in range(n)
    ]
    del blocks
    probes = [
        torch.empty(elements, device=device).isnan().all()
        for elements in (100, 3000, 1 << 15, 1 << 17, 1 << 20)
    ]
    assert int(torch.stack(probes).sum()) >= 4, "the pool is not poisoned: this test would show nothing"
