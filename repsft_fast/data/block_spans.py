"""What `{% generation %}` blocks of a chat template mark as trained, turn by turn."""

from __future__ import annotations

import re

from repsft_fast.data.kept import check_turn
from repsft_fast.data.renders import Renders, Span, closing_tokens, thinking_of
from repsft_fast.errors import DataError, describe


def block_spans(renders: Renders, turns: list[int]) -> dict[int, list[Span]]:
    assistants = [number for number, message in enumerate(renders.messages) if message["role"] == "assistant"]
    owned = dict(zip(assistants, ([block] for block in renders.blocks)))
    if len(renders.blocks) != len(assistants):
        owned = _owners(renders, assistants)
    whole, spans = renders.whole, {}
    closers: dict[str, bool] = {}
    begun: dict[str, str | None] = {}
    for turn in reversed(turns):  # the last one shows what closes a turn
        blocks = owned.get(turn, [])
        if not blocks:
            wrong = "the chat template's {% generation %} blocks leave this turn out"
            todo = "mend tokenizer.chat_template, untrain the turn (weight: 0), or set data.on_bad_row: drop"
            raise DataError(describe(renders.place(turn), wrong, todo=todo))
        start, end = blocks[-1]
        blocks = [*blocks[:-1], (start, _block_end(renders, turn, start, end, closers))]
        if turn + 1 in assistants and _is_merged(renders, turn, blocks[-1][1]):
            wrong = (
                "the chat template merges this turn with the next one and writes no end of turn between them"
            )
            raise DataError(
                describe(renders.place(turn), wrong, todo="merge the turns, or set data.on_bad_row: drop")
            )
        text = "".join(whole[start:end] for start, end in blocks)
        check_turn(renders.messages[turn], thinking_of(whole[: blocks[0][0]]) + text, renders.place(turn))
        start, end = blocks[0]
        blocks[0] = start + _given(renders, turn, start, begun), end
        spans[turn] = blocks
    return spans


def _is_merged(renders: Renders, turn: int, end: int) -> bool:
    ended, alone = renders.whole[:end].rstrip(), renders.prefix(turn + 1).rstrip()
    return alone.endswith(renders.specials) and not ended.endswith(renders.specials)


def _owners(renders: Renders, assistants: list[int]) -> dict[int, list[Span]]:
    """Which blocks are whose, when there is not one for every assistant turn: those which its prefix has,
    too.

    A last block of special tokens only, behind a block that ends in one, ends the text and not the turn (Phi
    3's eos).
    """
    owned: dict[int, list[Span]] = {}
    left = renders.blocks
    for turn in assistants:
        if turn == len(renders.messages) - 1:
            begins = _begins(renders, turn)
            owned[turn] = [block for block in left if begins is not None and block[0] >= begins]
            left = owned[turn]
        else:
            text, blocks = renders.render(renders.messages[: turn + 1])
            owned[turn] = [
                block
                for block in left
                if block in blocks and renders.whole[slice(*block)] == text[slice(*block)]
            ]
        left = left[len(owned[turn]) :]
        while len(owned[turn]) > 1 and _closes_only(renders, *owned[turn][-2:]):
            owned[turn] = owned[turn][:-1]
    return {turn: [(start, end) for start, end in blocks if start < end] for turn, blocks in owned.items()}


def _begins(renders: Renders, turn: int) -> int | None:
    """Where the last turn begins, header included: where the text before it ends, or its generation prompt
    begins."""
    before = renders.prefix(turn)
    if renders.whole.startswith(before):
        return len(before)
    # a template that ends every chat with another token (Phi 3's eos) has no such prefix
    prompt = renders.prompt(turn)
    return len(prompt) - len(renders.opener) if renders.whole.startswith(prompt) else None


def _closes_only(renders: Renders, before: Span, block: Span) -> bool:
    closing = closing_tokens(renders.whole[slice(*block)], renders.specials)
    only = closing and not renders.whole[block[0] : block[0] + closing[-1][1]].strip()
    return bool(only) and renders.whole[slice(*before)].rstrip().endswith(renders.specials)


def _given(renders: Renders, turn: int, start: int, begun: dict[str, str | None]) -> int:
    """How many characters of the block that begins at `start` its generation prompt holds already: they are
    not trained.

    begun: for every role that a turn may follow, what the prompt held of the block then; a prompt behind a
    tool's result may be another than behind a question.
    """
    whole, before = renders.whole, renders.messages[turn - 1]["role"] if turn else ""
    if before not in ("", "user"):
        if before not in begun:
            try:
                prompt = renders.prompt(turn)
            except MemoryError:
                raise
            # a template may raise anything; it does not take the beginning of this chat alone
            except Exception:
                prompt = None
            begun[before] = (
                whole[start : len(prompt)] if prompt is not None and whole.startswith(prompt) else None
            )
        held = begun[before]
        if held is not None and whole.startswith(held, start):
            return len(held)
    # Where the turn thinks otherwise than the prompt does (a prompt that begins to think, an answer without
    # thinking), the header alone is given.
    for given in (renders.opener, renders.opener.removesuffix(thinking_of(renders.opener))):
        for outside in range(len(given), -1, -1):
            if whole.endswith(given[:outside], 0, start) and whole.startswith(given[outside:], start):
                return len(given) - outside
    return 0


def _block_end(renders: Renders, turn: int, start: int, end: int, closers: dict[str, bool]) -> int:
    """The block's end, white space off; with the special token behind it when that ends the turn and none is
    in the block."""
    whole, specials = renders.whole, renders.specials
    said = len(whole[:end].rstrip())
    if said > start and whole[start:said].endswith(specials):
        return said
    behind = re.compile(r"\s*").match(whole, end)
    assert behind is not None
    closing = next((special for special in specials if whole.startswith(special, behind.end())), None)
    if closing is None:
        return end
    gap = behind[0] + closing
    if gap not in closers:  # the token that opens the next turn is not there when this turn is the last
        alone = renders.prefix(turn + 1)
        closers[gap] = alone.startswith(whole[:end]) and alone.startswith(gap, end)
    return behind.end() + len(closing) if closers[gap] else end
