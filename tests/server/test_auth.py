"""Keys: which presented ones are taken, what is derived from them, and that none of them shows."""

from pathlib import Path

import pytest

from octavo.errors import ConfigError
from octavo.server import auth
from octavo.server.auth import Keys, read_keys

KEYS = Keys(["alpha", "beta,=/+", "gamma"])


@pytest.mark.parametrize("authorization", [
    b"Bearer alpha", b"bearer alpha", b"BEARER  alpha", b"Bearer beta,=/+", b"Bearer gamma"])
def test_every_key_is_taken_under_every_spelling_of_bearer(authorization: bytes) -> None:
    assert KEYS.salt(authorization, None)
    assert KEYS.salt(None, authorization.split()[-1])


@pytest.mark.parametrize("authorization", [
    None, b"", b"alpha", b"Bearer", b"Bearer ", b"Bearer alph", b"Bearer alphaa", b"Bearer Alpha", b"Bearer alpha x",
    b"Basic alpha", b"Bearer\talpha", b"Bearer=alpha", b"Bearer \xff\xfe", b"Bearer alpha,gamma",
    b"Bearer " + b"x" * 30000, b"Bearer *"])
def test_nothing_else_is_taken(authorization: bytes | None) -> None:
    assert KEYS.salt(authorization, None) is None
    assert KEYS.salt(authorization, b"wrong") is None
    assert KEYS.salt(None, authorization) is None or authorization == b"alpha"


def test_one_good_key_beside_a_bad_one_is_enough() -> None:
    assert KEYS.salt(b"Bearer dummy", b"alpha") == KEYS.salt(b"Bearer alpha", b"dummy") == KEYS.salt(b"Bearer alpha", None)


def test_salts_differ_between_keys_and_do_not_show_them() -> None:
    salts = {KEYS.salt(None, key) for key in (b"alpha", b"gamma", b"beta,=/+")}
    assert len(salts) == 3 and all(salt and len(salt) == 32 for salt in salts)
    assert KEYS.salt(None, b"alpha") == Keys(["alpha"]).salt(None, b"alpha")
    assert Keys().salt(None, None) == "" and not Keys() and KEYS
    assert "alpha" not in repr(KEYS) and "alpha" not in repr(vars(KEYS))


def test_all_keys_are_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: seen.append(len(a)) or a == b)
    for key in (b"alpha", b"gamma", b"wrong"):
        seen.clear()
        KEYS.salt(None, key)
        assert seen == [32, 32, 32]


def test_keys_of_a_file_are_added(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n  one  \r\ntwo\n\n")
    keys = read_keys(["zero"], str(file))
    assert all(keys.salt(None, key) for key in (b"zero", b"one", b"two")) and keys.salt(None, b"") is None
    assert not read_keys([], None)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", b"two words\n", "schlüssel".encode()])
def test_a_file_without_keys_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_keys([], str(file))
    assert "two" not in str(caught.value) and "schl" not in str(caught.value)
    with pytest.raises(ConfigError):
        read_keys([], str(tmp_path / "missing"))


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "é"])
def test_keys_that_no_header_can_carry_are_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        Keys([key])
