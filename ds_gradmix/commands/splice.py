"""Putting a key into the text of a ds_config, of which every other byte stays as it is, comments included.

The text is scanned as JSON with comments, for where the members of its object lie. Hjson allows more, such as
strings without quotes, which a scan can misread; so what comes of an edit is parsed by whoever asked for it,
and the next of the edits is tried if that is not what was wanted.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|\#[^\n]*|/\*.*?\*/)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<mark>[{}\[\],:])
      | (?P<word>(?:(?!//|/\*)[^\s{}\[\],:"\#])+|.)""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """A string, a mark of punctuation or a word, and where it lies in the text."""

    text: str
    start: int
    end: int


class Member(NamedTuple):
    """A key of the outermost object, and where its value lies."""

    key: str
    key_start: int
    start: int
    end: int


class Layout(NamedTuple):
    """How an object is written: its members, its braces, and whether a comma stands after the last member."""

    members: list[Member]
    opening: int
    closing: int
    has_last_comma: bool


def edits(text: str, key: str, value: Mapping[str, Any]) -> Iterator[str]:
    """Texts in which the outermost object has this value under the key, best first; which one is right is
    for the caller to find out by parsing them.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    layout = _layout(text)
    if layout is None:  # Hjson needs no braces around all
        yield f"{text.rstrip()}{newline}{_member(key, value, '', '  ', newline)}{newline}"
        return
    found = [member for member in layout.members if member.key == key]
    if found:
        yield _replaced(text, found[-1], value, newline)
        return
    yield from _added(text, layout, _NewMember(key, value, newline))


class _NewMember(NamedTuple):
    key: str
    value: Mapping[str, Any]
    newline: str


def _replaced(text: str, member: Member, value: Mapping[str, Any], newline: str) -> str:
    indent = _indent_before(text, member.key_start)
    written = json.dumps(value) if indent is None else _dumps(value, indent, indent or "  ", newline)
    return text[: member.start] + written + text[member.end :]


def _added(text: str, layout: Layout, new: _NewMember) -> Iterator[str]:
    """After the last member: with a comma before it, or, as Hjson allows, without."""
    closing = layout.closing
    if not layout.members:
        inside = text[layout.opening + 1 : closing]
        if "\n" not in inside:
            yield f"{text[:closing].rstrip()}{json.dumps(new.key)}: {json.dumps(new.value)}{text[closing:]}"
            return
        indent = (_indent_before(text, closing) or "") + "  "
        member = _member(new.key, new.value, indent, "  ", new.newline)
        yield f"{text[: layout.opening + 1]}{inside.rstrip()}{new.newline}{member}" + _tail(
            text, closing, new
        )
        return
    last = layout.members[-1]
    indent_found = _indent_before(text, layout.members[0].key_start)
    for comma in ("" if layout.has_last_comma else ",", ""):
        before, after = text[: last.end] + comma, text[last.end : closing]
        if indent_found is None and "\n" not in after:
            yield f"{before}{after.rstrip()} {json.dumps(new.key)}: {json.dumps(new.value)}{text[closing:]}"
            continue
        indent = indent_found if indent_found is not None else "  "
        member = _member(new.key, new.value, indent, indent or "  ", new.newline)
        yield f"{before}{after.rstrip()}{new.newline}{member}" + _tail(text, closing, new)


def _tail(text: str, closing: int, new: _NewMember) -> str:
    """The closing brace and what follows it, on a line of its own."""
    return new.newline + (_indent_before(text, closing) or "") + text[closing:]


def _member(key: str, value: Mapping[str, Any], indent: str, step: str, newline: str) -> str:
    return f"{indent}{json.dumps(key)}: {_dumps(value, indent, step, newline)}"


def _dumps(value: Mapping[str, Any], indent: str, step: str, newline: str) -> str:
    """The value as indented JSON, whose first line is not indented."""
    return json.dumps(value, indent=step).replace("\n", newline + indent)


def _indent_before(text: str, position: int) -> str | None:
    """The white space before a position, if nothing else is before it in its line; None in the first line."""
    start = text.rfind("\n", 0, position) + 1
    before = text[start:position]
    return before if start and not before.strip() else None


def _layout(text: str) -> Layout | None:
    """Where the members of the outermost object lie; None if it has no braces."""
    tokens = [
        Token(match.group(), match.start(), match.end())
        for match in _TOKEN.finditer(text.removeprefix("\ufeff"))
        if match.lastgroup != "space"
    ]
    shift = len(text) - len(text.removeprefix("\ufeff"))
    tokens = [Token(token.text, token.start + shift, token.end + shift) for token in tokens]
    if not tokens or tokens[0].text != "{" or tokens[-1].text != "}":
        return None
    members: list[Member] = []
    depth = 0
    for i, token in enumerate(tokens[:-1]):
        if token.text in ("{", "["):
            depth += 1
        elif token.text in ("}", "]"):
            depth -= 1
        elif token.text == ":" and depth == 1 and tokens[i + 1].text not in (",", "}"):
            key = tokens[i - 1]
            members.append(Member(_key(key.text), key.start, tokens[i + 1].start, _end(tokens, i + 1)))
    has_comma = tokens[-2].text == ","
    if members:  # also where its value is a string of several words
        last = tokens[-3] if has_comma else tokens[-2]
        members[-1] = members[-1]._replace(end=last.end)
    return Layout(members, tokens[0].start, tokens[-1].start, has_comma)


def _key(text: str) -> str:
    return text[1:-1] if text.startswith('"') else text


def _end(tokens: list[Token], first: int) -> int:
    """Where the value ends that begins with a token."""
    depth = 0
    for token in tokens[first:]:
        depth += (token.text in ("{", "[")) - (token.text in ("}", "]"))
        if depth <= 0:
            return token.end
    return tokens[-1].end
