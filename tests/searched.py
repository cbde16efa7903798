"""The search for copies, by trying every place: an oracle for the one that drafts."""

from __future__ import annotations


def agreed(text: list[int], end: int) -> int:
    """How many tokens up to `end` are the text's last ones."""
    length = 0
    while length <= end and text[end - length] == text[len(text) - 1 - length]:
        length += 1
    return length


def searched(text: list[int], longest: int) -> tuple[int, int]:
    """The length of the longest suffix that occurred before, and where the token after its last occurrence is; by trying every place."""
    best, place = 0, -1
    for end in range(len(text) - 1):
        length = min(agreed(text, end), longest)
        if length and length >= best:
            best, place = length, end + 1
    return best, place
