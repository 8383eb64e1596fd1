"""Records of the mSFT study as a cell leaves them."""

from benchmarks.studies import msft_study


def record(cell="sft C=6", seed=1, **changes):
    made = {
        "study": msft_study.STUDY, "cell": cell, "seed": seed, "tasks": ["a", "b"], "test": {"a": 0.5, "b": 0.7},
        "test_macro": 0.6, "validation": 0.6, "validation_start": 0.2, "result_moment": "0.2", "stages": 1, "updates": 10,
        "kept_updates": 8, "tokens": 1000, "discarded_tokens": 200, "evaluated_tokens": 500, "extra_tokens": 0,
        "train_flops": 1e12, "evaluation_flops": 2e12, "seconds": 9.0, "evaluation_seconds": 3.0,
        "snapshots": {"seconds": 0.002}, "exclusions": [],
        "curve": [["0.0", 0, 0.0, 0.1, 0.3], ["0.1", 0, 0.25, 0.6, 0.2], ["0.2", 0, 0.5, 0.6, 0.5]],
    }  # fmt: skip
    return made | changes
