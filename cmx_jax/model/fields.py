"""Reads typed fields of a parsed `config.json`; a value of another type is refused by name, in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.model.limits import expect

Raw = Mapping[str, Any]


def integer(raw: Raw, field: str, default: int | None = None) -> int:
    """An integer. Absent and null mean the default; without a default they are refused."""
    value = raw.get(field)
    value = default if value is None else value
    if value is None:
        raise CmxError(f"config: {field} is missing, expected an integer")
    if isinstance(value, bool) or not isinstance(value, int):
        raise CmxError(f"config: {field} is {str(value)[:40]!r}, expected an integer")
    return value


def optional_integer(raw: Raw, field: str) -> int | None:
    """An integer or null."""
    return None if raw.get(field) is None else integer(raw, field)


def number(raw: Raw, field: str, default: Any) -> Any:
    """A finite number. Absent and null mean the default."""
    value = raw.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise CmxError(f"config: {field} is {str(value)[:40]}, expected a finite number")
    return float(value)


def flag(raw: Raw, field: str, default: bool) -> bool:
    """True or false. Absent means the default, null means false, as in transformers."""
    value = raw.get(field)
    if field not in raw:
        return default
    if value is not None and not isinstance(value, bool):
        raise CmxError(f"config: {field} is {str(value)[:40]!r}, expected true or false")
    return bool(value)


def integers(raw: Raw, field: str) -> list[int] | None:
    """A list of integers, or null."""
    value = raw.get(field)
    good = value is None or (isinstance(value, list) and all(type(i) is int for i in value))
    expect(good, field, str(value)[:40], "a list of integers")
    return value


def only(raw: Raw, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses values that would be computed wrongly.

    Args:
      raw: The parsed config.
      allowed: Implemented values of each field; null and absent are always allowed.

    Raises:
      CmxError: A field has another value.
    """
    for field, values in allowed.items():
        value = raw.get(field)
        if value is not None and value not in values:
            raise CmxError(f"config: {field} is {str(value)[:80]!r}, supported is {values[0]!r}")


def mapping(raw: Raw, field: str) -> Raw:
    """An object; absent and null mean an empty one."""
    value = {} if raw.get(field) is None else raw[field]
    if not isinstance(value, Mapping):
        raise CmxError(f"config: {field} is {str(value)[:40]!r}, expected an object")
    return value


def token_ids(raw: Raw, field: str) -> tuple[int, ...]:
    """An id, a list of ids, or null."""
    value = raw.get(field)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    expect(all(type(i) is int for i in ids), field, value, "an id or a list of ids")
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model's directory.

    Raises:
      CmxError: The file does not exist, cannot be read, or is not a JSON object.
    """
    if not path.is_file():
        raise CmxError(f"{path.parent}: no {path.name} there, expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CmxError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise CmxError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(raw, dict):
        raise CmxError(f"{path}: holds {type(raw).__name__}, expected a JSON object")
    return raw
