"""Tables and numbers for people: aligned, and free of control characters when piped."""

import pytest

from octavo.commands.console import number_text, print_table


def test_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Title", ("part", "size", "how"), [("a", "1", "x"), ("long", "100", "")], numeric={1})
    assert capsys.readouterr().out == "Title\n  part  size  how\n  a        1  x\n  long   100\n"


@pytest.mark.parametrize(("value", "text"), [
    (123456.7, "123,457"), (1234.5, "1,234"), (123.456, "123.5"), (1.23456, "1.235"), (0.00123, "0.0012"),
    (0.0, "0.0000"), (-12.345, "-12.35"),
])
def test_number_text(value: float, text: str) -> None:
    assert number_text(value) == text
