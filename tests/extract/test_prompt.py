import pytest
from hypothesis import given
from hypothesis import strategies as st

from relish.cache.errors import DataError
from relish.extract.prompt import fill, prompt_fields


def test_fields_come_once_in_the_order_of_first_use():
    assert prompt_fields("{b} and {a}, again {b}") == ("b", "a")


@pytest.mark.parametrize("name", ["translation.en", "Essay text", "a[0]", "0", "пример", "sentence_A"])
def test_a_field_is_the_column_of_exactly_that_name(name):
    template = f"Text: {{{name}}}"
    assert prompt_fields(template) == (name,)
    assert fill(template, {name: "x"}) == "Text: x"


def test_doubled_braces_are_braces():
    assert prompt_fields('{{"text": "{text}"}}') == ("text",)
    assert fill('{{"text": "{text}"}}', {"text": "x"}) == '{"text": "x"}'


@given(st.text(), st.text(), st.text())
def test_values_are_never_read_as_template(before, after, value):
    template = before.replace("{", "{{").replace("}", "}}") + "{t}" + after.replace("{", "{{").replace("}", "}}")
    assert fill(template, {"t": value}) == before + value + after


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", r"has no field; put the text's column in braces, such as \{text\}"),
        ("", "has no field"),
        ("{{text}}", "has no field"),
        ("a {} b", r"has an empty field \{\}; name the column in the braces"),
        ("a { } b", "has an empty field"),
        ("{text:>8}", r"has a format in the field 'text'; write \{text\} without ':' or '!'"),
        ("{text!r}", "has a format in the field 'text'"),
        ("{text", r"is malformed: .*; write \{\{ and \}\} for braces that are text"),
        ("text}", "is malformed"),
        (
            "Rate \udcff {text}",
            r"the prompt 'Rate \\udcff {text}' holds '\\udcff', half of a surrogate pair, which is no",
        ),
    ],
)
def test_a_template_that_cannot_be_filled_as_meant_is_refused(template, message):
    with pytest.raises(DataError, match=message):
        prompt_fields(template)


def test_a_value_that_is_missing_is_a_key_error():
    with pytest.raises(KeyError, match="b"):
        fill("{a}{b}", {"a": "x"})
