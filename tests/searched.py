"""An oracle for n-gram copying: the longest match, by trying every position."""

from __future__ import annotations


def agreed(text: list[int], end: int) -> int:
    """How many tokens up to position `end` equal the text's last tokens."""
    length = 0
    while length <= end and text[end - length] == text[len(text) - 1 - length]:
        length += 1
    return length


def searched(text: list[int], longest: int) -> tuple[int, int]:
    """Length of the longest suffix that occurred before, at most `longest`, and the position after its last occurrence; -1 for none."""
    best, place = 0, -1
    for end in range(len(text) - 1):
        length = min(agreed(text, end), longest)
        if length and length >= best:
            best, place = length, end + 1
    return best, place
