"""Words of a command line before they are parsed: config files, dotted JSON flags, help about a part of the flags.

Owns these three spellings, which vLLM's users know; it does not know what any flag means. Invariant: what comes out are
words that a plain parser understands, and a word of the command line wins over the same flag in a file.
"""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError


def with_config_file(words: Sequence[str], positional: str) -> list[str]:
    """The words with ``--config FILE`` replaced by what the YAML file says, before all others.

    Args:
        positional: the key of the file that is given as an argument without a flag, such as "model".

    Raises:
        ConfigError: the file cannot be read, or holds no mapping of flags to values.
    """
    rest, path = _take(words, "--config")
    if path is None:
        return list(words)
    import yaml  # 20 ms, and few commands read a file

    try:
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path} cannot be read as YAML: {' '.join(str(error).split())[:300]}", "config") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"config {path} must hold a mapping of flags to values.", "config")
    head: list[str] = []
    for key, value in found.items():
        flag = "--" + key.lstrip("-").replace("_", "-")
        if flag == f"--{positional}":
            head += [] if _has_positional(rest) or _given(rest, flag) else [str(value)]
        elif not _given(rest, flag):
            head += _spelt(flag, value)
    return head + rest


def with_json_flags(words: Sequence[str], flags: Collection[str]) -> list[str]:
    """The words with ``--flag.a.b VALUE`` and ``--flag.list+ VALUE`` gathered into ``--flag JSON``.

    Args:
        flags: those that take JSON objects.

    Raises:
        ConfigError: a dotted flag has no value, or goes through something that is no object.
    """
    plain: list[str] = []
    gathered: dict[str, dict[str, Any]] = {}
    at = 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        flag, dot, path = name.partition(".")
        at += 1
        if flag not in flags or not (dot or _is_object(value if equals else "".join(words[at : at + 1]))):
            plain.append(words[at - 1])
            continue
        if not equals:
            if at >= len(words):
                raise ConfigError(f"{name} needs a value.", flag.lstrip("-"))
            value, at = words[at], at + 1
        target = gathered.setdefault(flag, {})
        if dot:
            _put(target, path, _value(value), name)
        else:
            target.update(json.loads(value))
    return plain + [word for flag, found in gathered.items() for word in (flag, json.dumps(found))]


def help_about(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    """The answer to ``--help=WORD``: all flags (``all``, ``max``), a group, or the flags that have to do with a word.

    None: no such word is there.
    """
    asked = next((word.partition("=")[2] for word in words if word.startswith("--help=")), None)
    if asked is None:
        return None
    if asked.lower() in ("all", "max", ""):
        return parser.format_help()
    wanted = asked.lower().replace("_", "-")
    formatter = parser._get_formatter()
    count = 0
    for group in parser._action_groups:
        whole = (group.title or "").lower().startswith(wanted)
        actions = [action for action in group._group_actions if whole or _speaks_of(action, wanted)]
        count += len(actions)
        if actions:
            formatter.start_section(group.title)
            formatter.add_arguments(actions)
            formatter.end_section()
    if not count:
        return f"No flag of {parser.prog} has to do with {asked!r}; {parser.prog} --help lists them.\n"
    return formatter.format_help()


def _speaks_of(action: argparse.Action, wanted: str) -> bool:
    return any(wanted in name for name in action.option_strings) or wanted in (action.help or "").lower()


def _take(words: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """The words without a flag and its value, and the value."""
    for at, word in enumerate(words):
        if word == flag and at + 1 < len(words):
            return [*words[:at], *words[at + 2 :]], words[at + 1]
        if word.startswith(flag + "="):
            return [*words[:at], *words[at + 1 :]], word.partition("=")[2]
    return list(words), None


def _given(words: Sequence[str], flag: str) -> bool:
    names = {flag, flag.replace("--", "--no-", 1)} | ({flag.replace("--no-", "--", 1)} if flag.startswith("--no-") else set())
    return any(word.partition("=")[0].partition(".")[0] in names for word in words)


def _has_positional(words: Sequence[str]) -> bool:
    return bool(words) and not words[0].startswith("-")


def _spelt(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if value is None:
        return []
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, Mapping) else str(value)]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(target: dict[str, Any], path: str, value: Any, name: str) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{name} goes through {parent!r}, which has a value already.", name.lstrip("-"))
    if not last.strip("+") or not all(parents):
        raise ConfigError(f"{name} names nothing.", name.lstrip("-"))
    if not last.endswith("+"):
        target[last] = value
        return
    found = target.setdefault(last[:-1], [])
    if not isinstance(found, list):
        raise ConfigError(f"{name} adds to something that is no list.", name.lstrip("-"))
    found.append(value)
