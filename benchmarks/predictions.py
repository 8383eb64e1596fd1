"""What should be measured on an H200, said before measuring: floors in milliseconds, from operations and bytes.

Ceilings used: 790 TFLOP/s in bf16, 4.3 TB/s of reads and writes (both are measured anew in every session; these are
for the prediction only). A measurement far from its prediction, in either direction, is to be explained.
"""

FLOPS_PER_S = 790e12
BYTES_PER_S = 4.3e12


def head_ms(n: int, h: int, v: int, masked: float = 0.0, memorised: float = 0.0) -> float:
    """Three GEMMs of the trained rows, two of them without memorised rows, and one read and one read-write of the logits.

    6·N·H·V at N = 8,192, H = 4,096, V = 128,256: 32.7 ms, and 1.5 ms of traffic.
    """
    rows = n * (1 - masked)
    gemms = 2 * rows * h * v * (1 + 2 * (1 - memorised)) / FLOPS_PER_S
    logits = rows * v * 2
    traffic = logits * (1 + 2 * (1 - memorised)) / BYTES_PER_S
    return 1e3 * (gemms + traffic)


def adamw8bit_ms(parameters: int, weight_bytes: int = 2, gradient_bytes: int = 2) -> float:
    """Each byte once: weight read and written, gradient read, two moments of one byte read and written."""
    return 1e3 * parameters * (2 * weight_bytes + gradient_bytes + 4 + 4 / 256) / BYTES_PER_S


def snapshot_ms(held_bytes: int) -> float:
    """One read and one write of the state on the device."""
    return 1e3 * 2 * held_bytes / BYTES_PER_S


PREDICTIONS = {  # goal → (how it is read off the table, least or most)
    "dense: ours / fastest peer": ("most", 1.05),
    "dense: ours / three bare GEMMs": ("most", 1 / 0.9),
    "dense: peak / (chunk + fp32 head gradient)": ("most", 1.1),
    "N=8192: Liger default / ours": ("least", 1.5),
    "N=1024: Liger default / ours": ("least", 5.0),
    "head gradient finished in backward / at once": ("most", 0.97),  # 4.2 GB of scaling, 3.2 GB of casting at 32.7 ms of GEMMs
    "half masked: ours dense / ours": ("least", 1.9),
    "80 % memorised: ours dense / ours": ("least", 2.0),
    "paper A's metrics: their cost / our whole head": ("least", 1.0),
    "statistics: their cost / our whole head": ("most", 0.02),
    "snapshot take / plain device copy": ("most", 1.15),
    "snapshot restore / plain device copy": ("most", 1.15),
    "adamw8bit / its floor": ("most", 1.35),
    "through files / snapshot take and restore": ("least", 100.0),
    "state hash / its floor": ("most", 1.35),
    "whole update of 0.6B: MFU": ("least", 0.45),
    "checkpoint stall / ten minutes": ("most", 0.01),
}
