"""Models: load Hugging Face weights, meet backbone and head in `model.loss(row)`, save for
`from_pretrained`."""

from repsft_fast.models.checks import check_head, check_no_leak
from repsft_fast.models.export import save_pretrained, stop_at, stops_of, write_state
from repsft_fast.models.lengths import Lengths, learned_positions
from repsft_fast.models.load import config_of, load_model, load_tokenizer
from repsft_fast.models.lora import LoraSettings
from repsft_fast.models.loss import hidden_states

__all__ = [
    "Lengths",
    "LoraSettings",
    "check_head",
    "check_no_leak",
    "config_of",
    "hidden_states",
    "learned_positions",
    "load_model",
    "load_tokenizer",
    "save_pretrained",
    "stop_at",
    "stops_of",
    "write_state",
]
