"""The lines of .env mean what they mean to Docker Compose."""

import pytest

from common.dotenv import DotenvError, parse_dotenv


# What `docker compose config` makes of these lines; see the page that scripts/common/dotenv.py names.
@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("T_A=b", "b"),
        ("T_A = b c ", "b c"),
        ("T_A: b", "b"),
        ("export T_A=b", "b"),
        ("T_A=", ""),
        ("T_A=b # c", "b"),
        ("T_A=b# c", "b# c"),
        ("T_A= # c", ""),
        ("T_A=a\\nb", "a\\nb"),
        ("T_A='b # c' # d", "b # c"),
        ("T_A='$HOME \\n' ", "$HOME \\n"),
        (r"T_A='let\'s'", "let's"),
        ('T_A="b # c" # d', "b # c"),
        (r'T_A="a\tb\"c\\d\$e"', 'a\tb"c\\d$e'),
        ('T_A="two\nlines"', "two\nlines"),
        ("T_A=it's", "it's"),
        ("T_A=$T_B-${T_B}", "set-set"),
        ("T_A=${T_NO:-$T_B}${T_NO-${T_B:-x}}${T_EMPTY:-y}${T_EMPTY-z}", "setsety"),
        ("T_A=${T_B:+yes}${T_NO+no}${T_B?message}$T_NO", "yesset"),
        ("T_A=$$T_B", "$T_B"),
        ("T_A=`touch file`;ls | cat > file", "`touch file`;ls | cat > file"),
        ("T_A=first\nT_A=second", "second"),
        ("T_A=\u732b", "\u732b"),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_line_is_read_as_compose_reads_it(line, value, ends):
    text = f"\ufeff# a comment\n\n  {line}\n".replace("\n", ends)
    assert parse_dotenv(text, {"T_B": "set", "T_EMPTY": ""}) == {"T_A": value}
    assert parse_dotenv(text.rstrip(), {"T_B": "set", "T_EMPTY": "", "T_A": "of the environment"}) == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("A=1\n\nwords only\n", "line 3: must have the form NAME=value"),
        ("A=1\n$(hush)", "line 2: must have the form NAME=value"),
        ("=hush", "line 1: must have the form NAME=value"),
        ("A='hush\nB=2", "line 1: the value of A has no closing quote"),
        ("A='hush' B=2", "line 1: A has more than a comment after its closing quote"),
        ("A=hu$", "line 1: a $ must be written as $$"),
        ("A=${hush", "line 1: ${ has no closing brace"),
        ("A=${B*hush}", "line 1: a reference must have a form such as ${NAME}"),
        ("A=${B:?say B}", "line 1: B is required: say B"),
        ("A=\0", "line 1: contains a null character"),
    ],
)
def test_malformed_line_is_named_without_its_value(content, words):
    with pytest.raises(DotenvError) as failed:
        parse_dotenv(content, {})
    assert str(failed.value).startswith(words)
    assert "hush" not in str(failed.value)
