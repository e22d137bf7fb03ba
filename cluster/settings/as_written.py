"""YAML read as a person means it: what a setting's type calls text is taken letter by letter.

    text of a YAML file, words after key= ──▶ [as_written] ──▶ yaml_file

Left to itself YAML takes 2024_11_28 for a number, `runs/exp #2` for text with a comment, and 20,6,0.3 for text. Here
the type decides first: text is what is written, a list may be written with nothing but commas, the rest is YAML's.
Nothing in it is run or replaced, no tag and no `${...}`: settings may come from a stranger's run.
"""

import re
from typing import Any

import yaml

from cluster.settings.config import Config
from cluster.settings.kinds import field_kind, is_list, is_optional, is_text

NULL = ("null", "Null", "NULL")
"""What a person writes for no value. YAML's others, `~` and nothing, are paths or a slip where text is wanted."""
NUMBER = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+|[-+]?\.\d[\d_]*[eE][-+]?\d+")
"""Numbers that PyYAML misses: 5e-6, 1e3."""
MOST_NODES = 10_000
"""Values in a file, counted wherever an alias repeats them: a few lines of aliases can stand for a billion."""


class Loader(yaml.SafeLoader):
    """Numbers, words, lists and keys; no objects."""


class Dumper(yaml.SafeDumper):
    """Puts quotes around text that `Loader` would take for something else."""


for _side in (Loader, Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def parse(text: str, kind: Any = Config) -> Any:
    """The value of a YAML text for a setting, or a section, of a type. Raises YAMLError or ValueError."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size([node])
        return _value(node, kind, loader)
    finally:
        loader.dispose()


def parse_words(words: str, kind: Any) -> Any:
    """The value of the words after `key=`. Raises as `parse`."""
    if is_text(kind):
        return None if is_optional(kind) and words in NULL else words
    return parse(_as_yaml_list(words) if is_list(kind) else words, kind)


def _value(node: yaml.Node, kind: Any, loader: Loader) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _section(node, kind, loader)
    if not isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node, deep=True)
    is_null = node.tag.endswith(":null")
    if is_text(kind):
        return None if is_null and (is_optional(kind) or not node.value) else node.value
    if is_list(kind) and not is_null:
        return parse(_as_yaml_list(node.value))
    return loader.construct_object(node)


def _section(node: yaml.MappingNode, kind: Any, loader: Loader) -> dict[str, Any]:
    """Raises ValueError for a key that is there twice: the one that is read last would win unseen."""
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)}: there twice (line {node.start_mark.line + 1} and below)")
    loader.flatten_mapping(node)
    return {str(key.value): _value(value, field_kind(kind, str(key.value)), loader) for key, value in node.value}


def _check_size(nodes: list[yaml.Node]) -> None:
    """Raises ValueError for more values than settings have, as aliases of aliases make them, or one within itself."""
    count = 0
    while nodes:
        node, count = nodes.pop(), count + 1
        if count > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES:,} values, with what its aliases (*name) repeat")
        if isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            nodes.extend(one for pair in node.value for one in pair)


def _as_yaml_list(words: str) -> str:
    """ "20,6,0.3", "(20, 6)", "256x128" or "30" as YAML writes lists; what YAML takes for one or for null as it is."""
    words = words.strip()
    if words.startswith("[") or words in (*NULL, "~", ""):
        return words
    if size := re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", words):
        return f"[{size[1]}, {size[2]}]"
    return f"[{words.removeprefix('(').removesuffix(')')}]"
