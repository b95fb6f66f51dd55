"""No secret value survives in a command line or an environment, whatever stands around it."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import masking
from receiver.config import _SECRETS
from receiver.masking import MASK
from receiver.process import arguments, mask

SECRETS = re.compile(_SECRETS, re.IGNORECASE)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["mysqld", "--port=3306", "--password=hush"], ["mysqld", "--port=3306", f"--password={MASK}"]),
        (["p", "--password", "hush", "file"], ["p", "--password", MASK, "file"]),
        (["p", "--password", "-hush"], ["p", "--password", MASK]),
        (["p", "-password", "hush"], ["p", "-password", MASK]),
        (["env", "API_KEY=hush hush", "p"], ["env", f"API_KEY={MASK}", "p"]),
        (["curl", "-H", "Authorization: Bearer hush"], ["curl", "-H", f"Authorization:{MASK}"]),
        (["curl", "https://h/x?a=b&token=hush"], ["curl", f"https://h/x?a=b&token={MASK}"]),
        (["psql", "postgres://me:hu@sh@h:5432/db"], ["psql", f"postgres://me:{MASK}@h:5432/db"]),
        (["p", "--db", "amqp://u:hush@a,amqp://u:hush@b"], ["p", "--db", f"amqp://u:{MASK}@b"]),
        (["sh", "-c", "PGPASSWORD='hush hush' psql"], ["sh", "-c", f"PGPASSWORD={MASK}"]),
        (["sh", "-c", "mysql --password hush"], ["sh", "-c", f"mysql --password {MASK}"]),
        (["java", "-Djavax.net.ssl.keyStorePassword=hush"], ["java", f"-Djavax.net.ssl.keyStorePassword={MASK}"]),
        (["p", '{"user": "me", "password" : "hush"}'], ["p", f'{{"user": "me", "password" :{MASK}']),
        # What nobody hides.
        (["git", "clone", "ssh://git@h/x"], ["git", "clone", "ssh://git@h/x"]),
        (["ls", "-l", "/usr/bin:/bin", "a@b", "x=1"], ["ls", "-l", "/usr/bin:/bin", "a@b", "x=1"]),
        (["p", "KeyError: 'colour'"], ["p", "KeyError: 'colour'"]),
        (["p", "", "--", "-"], ["p", "", "--", "-"]),
        # Known limits (docs/facts.md): nothing says that these are secrets.
        (["mysql", "-phush"], ["mysql", "-phush"]),
        (["login", "hush"], ["login", "hush"]),
    ],
)
def test_command_lines(words: list[str], shown: list[str]) -> None:
    raw = b"".join(word.encode() + b"\0" for word in words)
    assert arguments(raw, SECRETS) == shown
    # The settings may say that nothing is secret by its name.
    assert arguments(raw, re.compile("(?!)")) == [masking._urls(word) for word in words]


NAMES = st.sampled_from(
    ["password", "PGPASSWORD", "db-pass", "client_secret", "api.key", "X-Auth-Token", "MYSQL_PWD", "COOKIE", "dsn"]
)
# A value that no other part of the text contains, of any characters that the place may have.
VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).map(
    lambda text: f"h{text}ush"
)
URL_VALUES = st.text(
    st.characters(exclude_categories=["Cs", "Z", "C"], exclude_characters="\0"), min_size=1, max_size=30
).map(lambda text: f"h{text}ush")
AROUND = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
IN_A_WORD = st.sampled_from(["--{}={}", "{}={}", "-D{}={}", "{}: {}", '"{}": "{}"', "/x?a=1&{}={}&b=2", "{}:{}"])


@given(NAMES, VALUES, IN_A_WORD, st.lists(AROUND, max_size=3))
def test_a_named_value_does_not_survive(name: str, value: str, form: str, others: list[str]) -> None:
    words = [*others, form.format(name, value), *others]
    shown = arguments("\0".join(words).encode() + b"\0", SECRETS)
    assert not any(value in word for word in shown if not any(value in other for other in others))
    assert any(MASK in word for word in shown)


@given(NAMES, VALUES, AROUND)
def test_the_word_after_an_option_does_not_survive(name: str, value: str, program: str) -> None:
    shown = arguments(f"x{program}\0--{name}\0{value}\0end\0".encode(), SECRETS)
    assert shown[1:] == [f"--{name}", MASK, "end"] or MASK in shown[0] or shown[1] == MASK
    assert value not in shown[1:]


@given(URL_VALUES, AROUND, AROUND)
def test_a_password_of_an_url_does_not_survive(value: str, before: str, after: str) -> None:
    url = f"{before} postgres://user:{value}@host/{after}"
    found = [*arguments(f"p\0{url}\0".encode(), SECRETS)[1:], *mask(f"A={url}\0".encode(), SECRETS).values()]
    for shown in found:
        assert f":{value}@" not in shown


@given(NAMES, VALUES, AROUND, st.sampled_from(["{}={}", "--{} {}", "-x --{}={}"]))
def test_an_environment(name: str, value: str, before: str, form: str) -> None:
    """By the name of a variable, and by a name within another one's value."""
    inner = before + " " + form.format(name, value)
    shown = mask(f"{name}={value}\0JAVA_OPTS={inner}\0PLAIN=plain\0".encode(), SECRETS)
    assert shown[name] == MASK
    assert shown["PLAIN"] == "plain"
    assert value not in shown["JAVA_OPTS"] or value in before


@given(st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    for word in arguments(raw, SECRETS):
        word.encode()
    mask(raw, SECRETS)


@pytest.mark.parametrize(
    "piece", ["a", "a ", "://:", "@://:", "-a ", '"', " ", 'a" ', "password", "a:", "=", "-password", "://a:b@ "]
)
def test_time_is_linear(piece: str) -> None:
    """A crashed program writes its command line, and waits for nobody."""

    def seconds(size: int) -> float:
        line = (piece * size)[:size]
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            masking.text(line, SECRETS)
            masking.arguments(line.split(" "), SECRETS)
            times.append(time.perf_counter() - begun)
        return min(times)

    # Sixteen times as much; were it quadratic, 256 times as long.
    assert seconds(16 << 12) < 80 * seconds(1 << 12) + 1e-3
