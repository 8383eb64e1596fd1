"""Pieces of text → token ids and trained flags.

Where a tokenizer treats text the same at the start and in the middle (byte-level BPE: nearly every current
model), every piece is encoded on its own. The prompt's tokens are then exactly those it has when generating,
and no token straddles the border of trained text. Other tokenizers (SentencePiece with a dummy prefix) encode
the whole text; a token that straddles a border belongs to what comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repsft_fast.data.placeholders import Piece, special_strings
from repsft_fast.errors import DataError, describe


class Encoder:
    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.special_ids = {tokenizer.convert_tokens_to_ids(text) for text in special_strings(tokenizer)}
        self.concatenative = self._is_concatenative() or not getattr(tokenizer, "is_fast", False)
        # Added tokens that swallow the white space behind them (Phi's <|end|>): a cut there must not bring it
        # back.
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self.greedy = tuple(str(token) for token in added if token.rstrip)
        start = list(tokenizer("")["input_ids"])
        bos = tokenizer.bos_token_id
        self.head = [bos] if bos is not None and start[:1] == [bos] else []

    def _is_concatenative(self) -> bool:
        """Does a cut change the tokens? Tried at the two cuts a template makes: after a new line and before a
        word."""
        return all(
            self._plain([left + right])[0] == self._plain([left])[0] + self._plain([right])[0]
            for left, right in (("user\n", "word one"), ("word", " one"))
        )

    def _plain(self, texts: Sequence[str], raw: bool = False) -> list[list[int]]:
        if not texts:
            return []
        keywords = {"split_special_tokens": True} if raw else {}
        encoded = self._asked(texts, return_attention_mask=False, return_token_type_ids=False, **keywords)
        return [list(ids) for ids in encoded["input_ids"]]

    def _asked(self, texts: Sequence[str], **keywords: Any) -> Any:
        """The tokenizer's answer. DataError, quoting the text, where it gives up, as a rule at a pattern that
        never ends."""
        try:
            return self.tokenizer(list(texts), add_special_tokens=False, verbose=False, **keywords)
        except BaseException as error:  # a panic of tokenizers' Rust is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if len(texts) > 1:
                for text in texts:
                    self._asked([text], **keywords)
            cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            shown = texts[0] if len(texts[0]) <= 80 else f"{texts[0][:80]}… ({len(texts[0])} characters)"
            todo = "mend the row, or take another tokenizer"
            raise DataError(
                describe("tokenizer.path", f"cannot split a text ({cause})", got=repr(shown), todo=todo)
            ) from error

    def __call__(self, rows: Sequence[Sequence[Piece]]) -> list[tuple[list[int], list[bool]]]:
        """(ids, trained) of every row, without a leading or trailing token that no piece asks for."""
        whole = (
            []
            if self.concatenative
            else [n for n, row in enumerate(rows) if not any(piece.raw for piece in row)]
        )
        offsets = dict(zip(whole, self._by_offsets([rows[number] for number in whole])))
        pieces = [
            (number, piece)
            for number, row in enumerate(rows)
            if number not in offsets
            for piece in self._joined(row)
        ]
        plain = iter(self._plain([piece.text for _, piece in pieces if not piece.raw]))
        raw = iter(map(self._without_specials, [piece.text for _, piece in pieces if piece.raw]))
        result: list[tuple[list[int], list[bool]]] = [
            offsets.get(number, ([], [])) for number in range(len(rows))
        ]
        for number, piece in pieces:
            ids = next(raw if piece.raw else plain)
            result[number][0].extend(ids)
            result[number][1].extend([piece.trained] * len(ids))
        return result

    def _joined(self, row: Sequence[Piece]) -> Sequence[Piece]:
        """The row without the white space that the token at the end of a piece swallows where the text is not
        cut."""
        if not self.greedy or not any(piece.text.endswith(self.greedy) for piece in row if not piece.raw):
            return row
        joined: list[Piece] = []
        for piece in row:
            swallowed = (
                joined and not joined[-1].raw and not piece.raw and joined[-1].text.endswith(self.greedy)
            )
            # What the model writes itself it writes as it is: only what was given to it is read that way.
            joined.append(
                Piece(piece.text.lstrip(), piece.trained) if swallowed and not piece.trained else piece
            )
        return joined

    def _without_specials(self, text: str) -> list[int]:
        ids = self._plain([text], raw=True)[0]
        if not self.special_ids.isdisjoint(ids):  # a vocabulary whose ordinary entries hold the string, too
            ids = [token for character in text for token in self._plain([character], raw=True)[0]]
        return ids

    def _by_offsets(self, rows: Sequence[Sequence[Piece]]) -> list[tuple[list[int], list[bool]]]:
        if not rows:
            return []
        texts = ["".join(piece.text for piece in row) for row in rows]
        encoded = self._asked(texts, return_offsets_mapping=True)
        result = []
        for row, ids, spans in zip(rows, encoded["input_ids"], encoded["offset_mapping"]):
            flags: list[bool] = []
            for piece in row:
                flags += [piece.trained] * len(piece.text)
            result.append((list(ids), [start < len(flags) and flags[start] for start, _ in spans]))
        return result
