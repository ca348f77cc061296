"""Reads JSON and YAML that people write, with errors of one line: what it is, what was wrong with it."""

import json
from collections.abc import Iterable
from typing import Any

from mlfs.errors import MLFSError

MAX_DEPTH = 50  # what is read here has lists in lists in a mapping, in a mapping
MAX_VALUES = 1_000_000  # a few aliases in YAML can stand for more values than memory holds


def parse_json(text: str | bytes, what: str, expected: str = "") -> Any:
    """Reads JSON.

    Args:
        text: the JSON, as text or as bytes in UTF-8.
        what: what the error calls it, such as "--space".
        expected: what the error says was expected.

    Raises:
        MLFSError: it is not JSON, names something twice in one object, or is nested more than 50 deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _without_doubles(pairs, what))
    except RecursionError:
        raise _too_deep(what) from None
    except ValueError as error:  # UnicodeDecodeError among it
        raise MLFSError(f"{what} is not JSON ({error}){expected and f': expected {expected}'}") from None
    _check_extent(value, what)
    return value


def parse_yaml(text: str | bytes, what: str) -> Any:
    """Reads YAML, of plain values only: what would make objects of Python is refused.

    Args:
        text: the YAML, as text or as bytes in UTF-8. what: what the error calls it, such as the file's path.

    Raises:
        MLFSError: it is not YAML, gives a key twice in one mapping, is nested more than 50 deep or within itself, or
            stands for more than a million values.
    """
    import yaml

    try:
        # of bytes YAML takes UTF-16 too, which an error of one place for all files could not name
        node = yaml.compose(text.decode("utf-8") if isinstance(text, bytes) else text, yaml.SafeLoader)
        _check_keys(node, what)
        value = None if node is None else yaml.SafeLoader("").construct_document(node)
    except RecursionError:
        raise _too_deep(what) from None
    except UnicodeDecodeError as error:
        raise MLFSError(f"{what} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-02-30, a number of 5,000 digits
        raise MLFSError(f"{what} is not YAML: {' '.join(str(error).split())}") from None
    _check_extent(value, what)
    return value


def _without_doubles(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _check_doubles((key for key, _ in pairs), what)
    return found


def _check_doubles(keys: Iterable[Any], what: str) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise MLFSError(f"{what} gives {key!r} twice: keep one")
        seen.add(key)


def _check_keys(root: Any, what: str) -> None:
    """Raises MLFSError if a mapping of a YAML document gives a key twice; YAML's reader would take the last."""
    import yaml

    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_doubles((key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)), what)
            nodes += [child for pair in node.value for child in pair]
        else:
            nodes += node.value


def _check_extent(value: Any, what: str) -> None:
    """Raises MLFSError if a value is nested too deep, which a value within itself is, or has too many parts."""
    rest, count = [(value, 0)], 0
    while rest:
        part, depth = rest.pop()
        count += 1
        if count > MAX_VALUES:
            raise MLFSError(f"{what} has more than {MAX_VALUES:,} values: it is not what is expected here")
        if isinstance(part, dict | list | tuple | set):
            if depth == MAX_DEPTH:
                raise _too_deep(what)
            rest += [(child, depth + 1) for child in (part.values() if isinstance(part, dict) else part)]


def _too_deep(what: str) -> MLFSError:
    return MLFSError(f"{what} is nested more than {MAX_DEPTH} deep, or within itself: it is not what is expected here")
