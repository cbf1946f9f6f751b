"""API keys: who may ask, and under which salt the answers' prefix cache is kept.

Owns the digests of the keys; it does not know routes, and it keeps no key. Invariants: a presented key is compared with
every key, by digest, in a time that does not depend on how much of it is right; no key appears in a message, a log line
or a repr.
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from octavo.errors import ConfigError


class Keys:
    """The keys of a server; none at all means that everybody may ask.

    Args:
        keys: printable ASCII without spaces, not empty.

    Raises:
        ConfigError: a key that no header could carry; the message does not repeat it.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._salts: dict[bytes, str] = {}
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("An API key must be printable ASCII without spaces.", "api_key")
            data = key.encode()
            # The salt reaches the engine and its counters: it must not be the digest that a key is recognised by.
            self._salts[hashlib.sha256(data).digest()] = hashlib.sha256(b"octavo cache salt\0" + data).hexdigest()[:32]

    def __bool__(self) -> bool:
        return bool(self._salts)

    def salt(self, authorization: bytes | None, x_api_key: bytes | None) -> str | None:
        """The cache salt of the key in one of two headers, None where neither holds a key; "" when there are no keys."""
        if not self._salts:
            return ""
        found = None
        for presented in (_bearer(authorization), x_api_key):
            if presented is not None:
                digest = hashlib.sha256(presented).digest()
                for known, salt in self._salts.items():
                    if hmac.compare_digest(digest, known):
                        found = salt
        return found


def read_keys(keys: Iterable[str], file: str | None) -> Keys:
    """Keys from options and from a file with one key per line; empty lines do not count.

    Raises:
        ConfigError: the file cannot be read or holds no key, so that a mistake never opens the server to everybody.
    """
    found = list(keys)
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"api_key_file {file} cannot be read.", "api_key_file") from exc
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:
            raise ConfigError(f"api_key_file {file} holds no key.", "api_key_file")
        found += from_file
    return Keys(found)


def _bearer(authorization: bytes | None) -> bytes | None:
    """The token of ``Bearer TOKEN``, the first word in any case."""
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(b" ")
    return token.strip(b" ") if scheme.lower() == b"bearer" else None
