"""Which text of a rendered conversation is trained: every asked turn, from behind its generation prompt to
its end of turn.

    P_k = render(messages[:k], add_generation_prompt)   what the model is given before turn k
    F_k = render(messages[:k + 1])                      the same with turn k
    W   = render(messages)                              what is trained on

Turn k's trained text is F_k past P_k, up to and including its end-of-turn token; the white space behind that
token is not trained, and neither is what a template writes only at the very end of a chat (Phi 3's
<|endoftext|> behind its <|end|>). It is taken where P_k and F_k, up to there, are prefixes of W, so that
every trained token has exactly the context it will have when generating. Where W shortens an earlier turn
(Qwen3 writes an empty thinking into the last turn only) W's form is taken, if all that the row says is still
in it.

`{% generation %}` blocks, where a template has them and they mark anything, take the place of P and F. Text
of the generation prompt inside a block is not trained; an end-of-turn token right behind a block is, unless
the block ends in one already.
"""

from __future__ import annotations

from typing import Any

from repsft_fast.data.block_spans import block_spans
from repsft_fast.data.kept import check_turn
from repsft_fast.data.long_chats import MANY_TURNS, long_chat_spans
from repsft_fast.data.renders import ANYBODY, Renders, Span, closing_tokens, thinking_of
from repsft_fast.errors import DataError, describe

NOTE_REWRITTEN = "rows have earlier turns that the chat template shortens: they are trained as it writes them"
NOTE_OPENER = (
    "rows go through a chat template without a generation prompt: what it writes before an answer is"
    " trained too"
)


def turn_spans(renders: Renders, turns: list[int]) -> dict[int, list[Span]]:
    """turn → its trained text, in pieces. Raises DataError naming the turn that the template loses or
    rewrites."""
    if renders.blocks:
        return block_spans(renders, turns)
    single = (
        long_chat_spans(renders, turns, _exact_span)
        if len(turns) > MANY_TURNS
        else {t: _exact_span(renders, t) for t in turns}
    )
    return {turn: [span] for turn, span in single.items()}


def _exact_span(renders: Renders, turn: int) -> Span:
    whole, place, message = renders.whole, renders.place(turn), renders.messages[turn]
    full, prompt = renders.prefix(turn + 1), renders.prompt(turn)
    # What is generated continues the prompt, so a turn that does not would be trained in another place.
    if not full.startswith(prompt):
        at = next((n for n, (a, b) in enumerate(zip(full, prompt)) if a != b), min(len(full), len(prompt)))
        wrong = "the chat template does not continue its generation prompt with this turn"
        raise DataError(
            describe(
                place,
                wrong,
                expected=repr(prompt[at : at + 40]),
                got=repr(full[at : at + 40]),
                todo=_OTHER_PROMPT,
            )
        )
    # Of the end tokens those count that stay once the chat goes on.
    last = turn == len(renders.messages) - 1
    ends = _ends_of_turn(_without_opener(renders, full), len(prompt), renders.specials)
    if last:
        end = _that_stays(renders, full, ends) if len(ends) > 1 else ends[0]
    else:
        kept = [end for end in ends if whole.startswith(full[:end])]
        if not kept:
            return _shortened_span(renders, turn, full[: ends[0]], prompt)
        end = kept[0]
    # Thinking that the prompt opens belongs to the turn, though it is not trained.
    check_turn(message, thinking_of(prompt) + full[len(prompt) : end], place)
    if _opens(full[len(prompt) : end], message):
        renders.notes.add(NOTE_OPENER)
    return len(prompt), end


_OTHER_PROMPT = (
    "set tokenizer.template_kwargs (enable_thinking: false, or true) or tokenizer.chat_template so that they"
    " agree, write the reasoning as the template does, or set data.on_bad_row: drop"
)


def _shortened_span(renders: Renders, turn: int, full: str, prompt: str) -> Span:
    """The turn as W writes it, once more turns follow: the end of F, when nothing that the row says is cut
    off."""
    if renders.whole.startswith(prompt):
        alone = full[len(prompt) :]
        # Its beginning may go (an empty thinking); what is left must be the turn to its last letter.
        for cut in range(1, len(alone)):
            if renders.whole.startswith(alone[cut:], len(prompt)):
                try:
                    check_turn(renders.messages[turn], alone[cut:], renders.place(turn))
                except DataError:
                    break
                renders.notes.add(NOTE_REWRITTEN)
                return len(prompt), len(prompt) + len(alone) - cut
    wrong = "the chat template rewrites this turn once more turns follow"
    todo = (
        "set data.train_on: last, a chat template with {% generation %} marks that keeps it, or"
        " data.on_bad_row: drop"
    )
    raise DataError(describe(renders.place(turn), wrong, todo=todo))


def _ends_of_turn(text: str, start: int, specials: tuple[str, ...]) -> list[int]:
    """Where the turn may end, longest first: behind each of the special tokens it ends with; else at the end
    of the text."""
    ends = [at + len(special) for special, at in closing_tokens(text, specials, start)]
    bare = len(text.rstrip())
    return ends or [len(text), *([bare] if start < bare < len(text) else [])]


def _without_opener(renders: Renders, full: str) -> str:
    """Some templates end every chat with the opener of an answer (Command R7B): that is not part of the turn
    before it."""
    _, opening, always = renders.question
    # What every chat ends in says nothing of this one.
    common = []
    for (special, start), expected in zip(closing_tokens(full, renders.specials) if always else (), always):
        if special != expected:
            break
        common.append((special, start))
    return next((full[:start] for special, start in reversed(common) if special in opening), full)


def _that_stays(renders: Renders, full: str, ends: list[int]) -> int:
    """Of several closing tokens those which stay when somebody goes on; the rest ends the text, not the
    turn."""
    if not full[: ends[-1]].endswith(renders.specials):
        return ends[0]
    try:
        on = renders.render([*renders.messages, ANYBODY])[0]
    except MemoryError:
        raise
    except Exception:  # a template may raise anything; it does not want this chat to go on
        return ends[0]
    return next((end for end in ends if on.startswith(full[:end])), ends[0])


def _opens(text: str, message: dict[str, Any]) -> bool:
    """Does something other than the message stand before it? Only asked of plain answers, where it can be
    told."""
    said = (message.get("content") or "").strip()
    if not said or message.get("reasoning_content") or message.get("tool_calls"):
        return False
    begun = text.lstrip().removeprefix("<think>")
    behind = begun.partition("</think>")[2]
    return said in text and not any(rest.lstrip().startswith(said) for rest in (text, begun, behind))
