"""What kind of value a setting takes, as its type in `config.py` says: text, a list, a section, or something else.

key or type ──▶ [kinds] ──▶ yaml_file, which reads text as it stands; paths, which knows a path from a word
"""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from cluster.settings.config import Config, PathMark


def kind_of(key: str) -> Any:
    """The type of the setting with that dotted key; None where there is no such setting."""
    kind: Any = Config
    for part in key.split("."):
        kind = field_kind(kind, part)
    return kind


def field_kind(kind: Any, name: str) -> Any:
    """The type of a section's field; None where the type is no section, or has no field of that name."""
    section = section_of(kind)
    field = section.model_fields.get(name) if section else None
    return field.rebuild_annotation() if field else None


def section_of(kind: Any) -> type[BaseModel] | None:
    """The section that a type is, or may be: PositiveInt | Elastic may be an Elastic."""
    sections = (one for one in _members(kind) if isinstance(one, type) and issubclass(one, BaseModel))
    return next(sections, None)


def is_text(kind: Any) -> bool:
    """Whether the values of a type are text: any, or one of some words; null beside it changes nothing."""
    members = [one for one in _members(kind) if one is not type(None)]
    return bool(members) and all(one is str or _is_choice_of_words(one) for one in members)


def is_optional(kind: Any) -> bool:
    return type(None) in _members(kind)


def is_list(kind: Any) -> bool:
    return any(get_origin(one) is tuple for one in _members(kind))


def path_mark(kind: Any) -> PathMark | None:
    """What makes a path of the text of a type; None where it is none."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        return next((mark for mark in marks if isinstance(mark, PathMark)), None) or path_mark(inner)
    if get_origin(kind) in (Union, UnionType):
        return next((mark for one in get_args(kind) if (mark := path_mark(one))), None)
    return None


def _is_choice_of_words(kind: Any) -> bool:
    return get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind))


def _members(kind: Any) -> Iterator[Any]:
    """The types that a union is made of, or the one type, each without its annotations."""
    if get_origin(kind) is Annotated:
        yield from _members(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            yield from _members(one)
    else:
        yield kind
