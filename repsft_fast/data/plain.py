"""Rows that need no chat template → pieces of text as they stand, and the tokens around them.

text, prompt + completion    [BOS] prompt completion EOS, the completion and its EOS trained
segments                     nothing before, between or behind them

Special-token strings stay text unless they are to be parsed. Where they are parsed, a text that ends in one
(a rendered chat: its end-of-turn token) gets no EOS behind it, and the white space after it is not trained,
as in a rendered chat.
"""

from __future__ import annotations

import re
from typing import Any

from repsft_fast.data.encode import Encoder
from repsft_fast.data.formats import Pair, Segments, Text
from repsft_fast.data.placeholders import Piece
from repsft_fast.data.template import Rendered

NOTE_SPELLED = (
    "rows of text hold special-token strings, which are spelled letter by letter and neither begin nor end a"
    " turn (tokenizer.special_tokens: parse makes them tokens: rendered chats need that)"
)
NOTE_OPEN = "rows of segments do not end in a special token: the model will not learn to stop"


def plain_pieces(
    parsed: Pair | Text | Segments, specials: re.Pattern[str] | None, *, parse_special: bool
) -> Rendered | None:
    """None when nothing but white space and special tokens would be trained."""
    texts = _texts(parsed)
    trained = "".join(text for text, flag in texts if flag)
    if not (specials.sub("", trained) if specials else trained).strip():
        return None
    # Spelled strings begin and end nothing, so such text gets its own ends.
    raw = not parse_special and specials is not None and any(specials.search(text) for text, _ in texts)
    pieces = [Piece(text, flag, raw) for text, flag in texts if text]
    ended = not raw and _ends_in_special(trained, specials)
    notes = [NOTE_SPELLED] if raw else []
    if isinstance(parsed, Segments):
        return Rendered(tuple(pieces), tuple(notes if ended else [*notes, NOTE_OPEN]))
    # As in a rendered chat: what is generated ends at the end of turn.
    if ended and (stripped := pieces[-1].text.rstrip()) != pieces[-1].text:
        pieces[-1:] = [Piece(stripped, True), Piece(pieces[-1].text[len(stripped) :], False)]
    return Rendered(tuple(pieces), tuple(notes), plain=True)


def _texts(parsed: Pair | Text | Segments) -> list[tuple[str, bool]]:
    if isinstance(parsed, Segments):
        return list(parsed.segments)
    return (
        [(parsed.prompt, False), (parsed.completion, True)]
        if isinstance(parsed, Pair)
        else [(parsed.text, True)]
    )


def _ends_in_special(text: str, specials: re.Pattern[str] | None) -> bool:
    stripped = text.rstrip()
    return specials is not None and any(match.end() == len(stripped) for match in specials.finditer(stripped))


def with_ends(
    ids: list[int], trained: list[bool], encoder: Encoder, tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """BOS where the tokenizer writes one, and a trained EOS, unless the row has them itself."""
    head, eos = encoder.head, tokenizer.eos_token_id
    if head and ids[: len(head)] != head:
        ids, trained = head + ids, [False] * len(head) + trained
    # An unknown letter or the token that opens a text is no end, though special.
    ends = encoder.special_ids - {tokenizer.bos_token_id, tokenizer.unk_token_id} | {eos}
    last = next((token for token, flag in zip(reversed(ids), reversed(trained)) if flag), None)
    if eos is not None and last not in ends:
        ids, trained = [*ids, eos], [*trained, True]
    return ids, trained
