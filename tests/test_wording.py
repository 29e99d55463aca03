"""Counts with their nouns."""

import pytest

from pretrain_lib.wording import plural


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, "document"), "0 documents"),
        ((1, "document"), "1 document"),
        ((2000, "document"), "2,000 documents"),
        ((1, "process", "processes"), "1 process"),
        ((2, "process", "processes"), "2 processes"),
    ],
)
def test_the_noun_agrees_with_the_count(arguments, text):
    assert plural(*arguments) == text
