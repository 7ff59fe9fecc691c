"""Undoing WikiText's word tokenization: "a well @-@ known fact , he 's sure ( " yes " ) ." as people write it.

Every artefact is a space (or an @) too many, so cleaning is a mask of bytes to leave out, computed for the whole text
at once: regular expressions, and even plain replacements, would take a third of the time that encoding takes.
"""

from __future__ import annotations

import numpy as np

_SPACE, _NEWLINE, _QUOTE, _APOSTROPHE, _AT = b" \n\"'@"
_DEGREE = "°".encode()
_BEFORE, _AFTER = b"   \n", b"\n   "  # around the text, so that neighbours exist and its ends are a line's border


def _among(characters: bytes) -> np.ndarray:
    """Table bool [256]: is a byte one of these characters?"""
    table = np.zeros(256, bool)
    table[list(characters)] = True
    return table


_BREAK, _OPENER, _CLOSER, _MARK = _among(b" \n"), _among(b"([{"), _among(b")]}"), _among(b",.;:!?")
_SHORT, _NUMBER_SIGN = _among(b"stmd"), _among(b"-,.")  # he 's, don 't, I 'm, he 'd; @-@ @,@ @.@
_LONG = (b"re", b"ve", b"ll")


def clean_wikitext(text: bytes) -> bytes:
    """UTF-8 text without the artefacts, and without a space at the border of a line.

    Removed: spaces before , . ; : ! ? and the closing brackets, after the opening ones, before 's 't 'm 'd 're 've 'll,
    within a pair of quotation marks on one line, around °, and " @-@ ", " @,@ ", " @.@ " but for the sign.
    """
    b = np.frombuffer(_BEFORE + text + _AFTER, np.uint8)
    drop = np.zeros(len(b), bool)
    drop[: len(_BEFORE)] = drop[-len(_AFTER) :] = True
    _drop_at_marks(b, drop)
    _drop_at_apostrophes(b, drop)
    _drop_within_pairs(b, drop, np.flatnonzero(b == _QUOTE))
    _drop_number_signs(b, drop)
    degrees = np.flatnonzero(b[1:-2] == _DEGREE[1]) + 1
    degrees = degrees[(b[degrees - 1] == _DEGREE[0]) & (b[degrees - 2] == _SPACE) & (b[degrees + 1] == _SPACE)]
    drop[degrees - 2] = drop[degrees + 1] = True
    return b[~drop].tobytes()


def _drop_at_marks(b: np.ndarray, drop: np.ndarray) -> None:
    """Spaces at the border of a line, before a mark that a space or the line's end follows, inside brackets."""
    space = np.flatnonzero(b[1:-2] == _SPACE) + 1
    before, after, second = b[space - 1], b[space + 1], b[space + 2]
    line_border = (before == _NEWLINE) | (after == _NEWLINE)
    drop[space] |= line_border | _OPENER[before] | _CLOSER[after] | (_MARK[after] & _BREAK[second])


def _drop_at_apostrophes(b: np.ndarray, drop: np.ndarray) -> None:
    """The space before a contraction and a possessive ("dogs ' tails"), and those inside single quotation marks."""
    at = np.flatnonzero(b == _APOSTROPHE)
    at = at[b[at - 1] == _SPACE]
    one, two, three = b[at + 1], b[at + 2], b[at + 3]
    contraction = _SHORT[one] & _BREAK[two]
    for first, second in _LONG:
        contraction |= (one == first) & (two == second) & _BREAK[three]
    possessive = _BREAK[one] & (b[at - 2] == ord("s"))  # a quotation that begins after an s looks the same
    drop[at[contraction | possessive] - 1] = True
    _drop_within_pairs(b, drop, at[_BREAK[one] & ~possessive])


def _drop_within_pairs(b: np.ndarray, drop: np.ndarray, at: np.ndarray) -> None:
    """Spaces after the first, third ... mark of a line, and before the second, fourth ...; a lone one is left alone."""
    line = np.searchsorted(np.flatnonzero(b == _NEWLINE), at)
    nth = np.arange(len(at)) - np.searchsorted(line, line)  # in its line
    has_next = np.append(line[1:] == line[:-1], False)[: len(at)]
    opening, closing = at[(nth % 2 == 0) & has_next], at[nth % 2 == 1]
    drop[opening[b[opening + 1] == _SPACE] + 1] = True
    drop[closing[b[closing - 1] == _SPACE] - 1] = True


def _drop_number_signs(b: np.ndarray, drop: np.ndarray) -> None:
    """All of " @-@ " but the sign in the middle."""
    at = np.flatnonzero(b == _AT)
    at = at[at + 3 < len(b)]
    at = at[(b[at - 1] == _SPACE) & _NUMBER_SIGN[b[at + 1]] & (b[at + 2] == _AT) & (b[at + 3] == _SPACE)]
    for offset in (-1, 0, 2, 3):
        drop[at + offset] = True
