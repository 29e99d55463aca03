"""Counts with their nouns, and what is left out of the messages of others."""

import pytest

from pretrain_lib.wording import plural, without_queries


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


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("403, url='https://host/a?Signature=b%3D&c=?'", "403, url='https://host/a?...'"),
        ('for "s3://b/a?v=1" and http://h?x y?', 'for "s3://b/a?..." and http://h?... y?'),
        ("is it there? https://host/a.txt", "is it there? https://host/a.txt"),
    ],
)
def test_queries_of_urls_are_left_out(text, left):
    assert without_queries(text) == left
