import pytest

from data_prep.prose import Deduplicator, is_prose, paragraphs

SENTENCE = "Return the number of items that were read from the given file so far."


def test_wrapped_lines_become_one_paragraph_without_markup():
    text = """
    Return the ``number`` of *items* that were
    read by :func:`~package.read` from the `given file <https://x.org>`_ so far [1]_.

    :param name: The name of the file that this function will read the items from.
    """
    assert paragraphs(text) == [
        "Return the number of items that were read by package.read from the given file so far.",
        "The name of the file that this function will read the items from.",
    ]


def test_headings_code_tables_and_parameters_are_left_out():
    text = f"""
    Notes of the Author
    -------------------
    {SENTENCE}

    >>> print("this is an example of how to call the function of this module")
    this is an example

    ====  =====
    one   two of these columns are not prose but a table of words and more words.
    ====  =====

    x : int, the first parameter of all the ones there are in this list.

    stmt ::= "if" expression ":" suite and so on until the statement has come to an end.

    Parameters
    ----------
    axis : int, optional
        The axis along which the values are counted, or all of them if none is given.
    """
    assert paragraphs(text) == [
        SENTENCE,
        "The axis along which the values are counted, or all of them if none is given.",
    ]


def test_items_and_commented_licences():
    second = "Copy the second of all these items to the place where it belongs."
    text = f"# {SENTENCE}\n#\n# - {SENTENCE}\n# - {second}\n"
    assert paragraphs(text) == [SENTENCE, SENTENCE, second]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENTENCE, True),
        ("Too short a text.", False),
        ("this line of words has no end and so it may well be a heading of its own", False),
        ("x[0] + y[1] - 3 * (z / 2) ** 4, 5, 6, 7 and 8 are all the same as 9 or 10 or 11.", False),
        ("Calls fit(x=1) on the model and returns the value that the call to it gives.", False),
    ],
)
def test_what_reads_as_prose(text, expected):
    assert is_prose(text) is expected


def test_near_copies_are_dropped():
    licence = "Permission is granted to {}, free of charge, to deal in the software without any restriction at all."
    unseen = Deduplicator()
    assert unseen.fresh([licence.format("any person")]) == [licence.format("any person")]
    assert unseen.fresh([licence.format("everyone")]) == []
    assert unseen.fresh([SENTENCE]) == [SENTENCE]
    assert unseen.fresh([SENTENCE.upper()]) == []
