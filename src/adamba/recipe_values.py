"""Checks one recipe value against a type annotation.

`fit` takes values as YAML gives them, `fit_text` the strings of a command line. Both raise `ValueError` with the
part of the message that follows the key: "got 8.5 (a fraction), needs a whole number".
"""

import difflib
import enum
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml

_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}


def contains(hint: Any, kinds: tuple[type, ...]) -> bool:
    """Whether the annotation is one of `kinds`, or a union with one of them."""
    return any(get_origin(member) in kinds or member in kinds for member in _members(hint))


def fit(value: Any, hint: Any) -> Any:
    """`value` as the annotation wants it: unchanged, or an int widened to float, a list to a tuple.

    Raises:
        ValueError: when no member of the annotation takes it.
    """
    members = _members(hint)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    if enums and isinstance(value, str):
        # transformers writes `IntervalStrategy | str`: the text must still be one of the enum's
        members = [member for member in members if member is not str]
    errors = []
    for member in members:
        try:
            return _fit_member(value, member)
        except _MismatchedValue as error:
            errors.append(error)
    inner = [error for error in errors if error.inside]
    if len(inner) == 1:
        raise ValueError(str(inner[0]))
    raise ValueError(f"got {_show(value)}, needs {describe(hint)}{_advice(value, members)}")


def fit_text(texts: Sequence[str], hint: Any) -> Any:
    """The value of a list or mapping given on the command line as one or more words.

    Mappings are `a=1,b=2` or YAML in braces; lists are several words, words joined by commas, or YAML in brackets.
    """
    joined = " ".join(texts)
    if joined[:1] in "{[" and joined:
        try:
            return load_yaml(joined)
        except yaml.YAMLError:
            raise ValueError(f"got {joined!r}, which is not valid YAML") from None
    if contains(hint, (dict,)) and "=" in joined:
        pairs = [pair.partition("=") for pair in joined.replace(",", " ").split()]
        return {key: load_yaml(value) for key, _, value in pairs}
    if contains(hint, (list, tuple)):
        inner = item_hint(hint)
        words = list(texts)
        if inner is not str:
            words = [word for text in texts for word in text.split(",") if word]
        items = [word if inner is str else load_yaml(word) for word in words]
        others = [m for m in _members(hint) if get_origin(m) not in (list, tuple) and m not in (list, tuple)]
        if len(items) == 1 and others:
            for member in others:  # `--width 64` for a field that is `int | list[int]`
                try:
                    return _fit_member(words[0] if member is str else load_yaml(words[0]), member)
                except _MismatchedValue:
                    continue
        return items
    value = load_yaml(joined)
    return value if isinstance(value, (int, float, type(None))) and not contains(hint, (str,)) else joined


def item_hint(hint: Any) -> Any:
    """The annotation of a list's items; `str` when it does not say."""
    for member in _members(hint):
        if get_origin(member) in (list, tuple) and get_args(member):
            return get_args(member)[0]
    return str


def describe(hint: Any) -> str:
    """The annotation in words, for instance "whole number or null"."""
    words = [_describe_member(member) for member in _members(hint)]
    return " or ".join(dict.fromkeys(words))


def load_yaml(text: str) -> Any:
    """Safe YAML in which `1e-4` is a number (YAML 1.1 makes it text) and a repeated key is an error."""
    return yaml.load(text, Loader=_RecipeLoader)


class _RecipeLoader(yaml.SafeLoader):
    pass


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _unique_mapping(loader: _RecipeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.value in seen:
            line = key_node.start_mark.line + 1
            raise yaml.YAMLError(f"key '{key_node.value}' is given twice, again on line {line}")
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_RecipeLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


class _MismatchedValue(ValueError):
    """`inside` is true when the container fits and one of its items does not."""

    def __init__(self, message: str = "", inside: bool = False) -> None:
        super().__init__(message)
        self.inside = inside


def _members(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for member in get_args(hint) for inner in _members(member)]
    return [hint]


def _fit_member(value: Any, hint: Any) -> Any:
    origin = get_origin(hint) or hint
    if origin is Any:
        return value
    if origin is Literal:
        # type-exact, because True == 1
        if any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            return value
        raise _MismatchedValue
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        if value in [choice.value for choice in origin] or value in list(origin):
            return value
        raise _MismatchedValue
    if origin is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise _MismatchedValue
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise _MismatchedValue
        inner = item_hint(hint) if get_args(hint) else Any
        return origin(_fit_item(item, inner, f"item {i}") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _MismatchedValue
        key_hint, value_hint = get_args(hint) or (Any, Any)
        return {_fit_item(k, key_hint, f"{k!r}"): _fit_item(v, value_hint, f"{k!r}") for k, v in value.items()}
    if origin in (int, str, bool, type(None)):
        if type(value) is origin:
            return value
        raise _MismatchedValue
    # an annotation this page does not know: leave it to the dataclass
    return value


def _fit_item(value: Any, hint: Any, place: str) -> Any:
    try:
        return fit(value, hint)
    except ValueError as error:
        raise _MismatchedValue(f"{place}: {error}", inside=True) from None


def _describe_member(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "one of " + ", ".join(repr(choice.value) for choice in origin)
    if origin in (list, tuple):
        return "list" + (f" of {describe(item_hint(hint))}" if get_args(hint) else "")
    if origin is dict:
        return "mapping" + (f" of {' to '.join(describe(h) for h in get_args(hint))}" if get_args(hint) else "")
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))


def _show(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    kind = "null" if value is None else kinds.get(type(value), "a mapping")
    return f"{value!r} ({kind})" if value is not None else "null"


def _advice(value: Any, members: list[Any]) -> str:
    choices = [str(c) for m in members if get_origin(m) is Literal for c in get_args(m)]
    choices += [str(c.value) for m in members if isinstance(m, type) and issubclass(m, enum.Enum) for c in m]
    if value is False and (str in members or "no" in choices):
        return "; YAML reads a bare no or off as false, so quote it: 'no'"
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
