"""dc:description in an XMP packet: read, and put in with all other bytes as they are.

XMP is RDF in XML (ISO 16684-1). Programs keep in it what they know of a photograph, and what they
do not know they leave alone: so is it here. Nothing is parsed into a tree and written again; what
changes is cut out and put in where expat says it stands. No document type is read, and so no
entity that another file or ten thousand copies would come of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn
from xml.parsers import expat
from xml.sax.saxutils import escape

#: Developments of many masks have some megabytes.
MAX_BYTES = 32_000_000
_MAX_DEPTH = 200
_MAX_SPACES = 200
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_XML = "http://www.w3.org/XML/1998/namespace"
_DEFAULT = "x-default"
#: What may be in what, from the outside in: by (namespace, name).
_PATH = ((_RDF, "RDF"), (_RDF, "Description"), (_DC, "description"), (_RDF, "Alt"), (_RDF, "li"))
_PATH_NAMES = (*(name for _, name in _PATH), None)
_ROOT, _DESCRIPTION, _PROPERTY, _ALT, _ITEM = range(1, 6)
_START_TAG = re.compile(rb"<(?:\"[^\"]*\"|'[^']*'|[^\"'>])*>")
_ATTRIBUTE = re.compile(rb"\s+([^\s=]+)\s*=\s*(?:\"[^\"]*\"|'[^']*')")
_NO_TEXT = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UNKNOWN = "holds a description in a form that is not known"
_TWICE = "has two descriptions"
_NEW = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{_RDF}">
  <rdf:Description rdf:about="" xmlns:dc="{_DC}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


@dataclass(eq=False)
class _Element:
    """An element, and where it stands in the bytes."""

    name: str
    level: int  # in _PATH; 0 for what lies beside it
    spaces: Mapping[str, str]
    attributes: Mapping[str, str]
    start: int
    inside: int  # behind its start tag
    is_empty: bool  # <name/>
    close: int = 0  # its end tag
    end: int = 0
    parts: list[str] = field(default_factory=list)
    has_elements: bool = False

    @property
    def text(self) -> str:
        """What was said in it."""
        return "".join(self.parts)

    def resolve(self, name: str, is_attribute: bool = False) -> tuple[str, str]:
        """The namespace and the local name of a name with a prefix."""
        prefix, colon, local = name.rpartition(":")
        return ("" if is_attribute and not colon else self.spaces.get(prefix, "")), local

    def attribute(self, space: str, local: str) -> str | None:
        """The name under which an attribute stands here."""
        wanted = (space, local)
        return next((n for n in self.attributes if self.resolve(n, True) == wanted), None)


#: Stands for all elements that no description is in.
_OTHER = _Element("", 0, {}, {}, 0, 0, False)


@dataclass
class _Packet:
    """What an XMP packet has of a description."""

    data: bytes
    encoding: str = "utf-8"
    root: _Element | None = None
    description: _Element | None = None  # the first rdf:Description
    inline: _Element | None = None  # the one that has dc:description as an attribute
    own: _Element | None = None  # dc:description
    alt: _Element | None = None
    item: _Element | None = None
    stack: list[_Element] = field(default_factory=list)

    @property
    def text(self) -> str | None:
        """The description, if there is one."""
        if self.item or self.alt:
            return self.item.text if self.item else None
        if self.own:
            return self.own.text
        name = self.inline and self.inline.attribute(_DC, "description")
        return self.inline.attributes[name] if self.inline and name else None

    def check_first(self) -> None:
        """Raises ValueError where there is a description already."""
        if self.inline or self.own:
            raise ValueError(_TWICE)


def read_description(data: bytes) -> str | None:
    """The description of a packet in no certain language; None where there is none.

    Raises:
        ValueError: It is no XMP, or what no XMP needs; as the end of a sentence about a file.
    """
    return (_parse(data).text or "").strip() or None if data.strip() else None


def with_description(data: bytes | None, text: str) -> bytes:
    """A packet with a description in no certain language (``x-default``), or a new one.

    Args:
        data (bytes, optional): The packet so far, of which all else stays as it is.
        text (str): The description; what XML cannot hold of it is left out.

    Raises:
        ValueError: See `read_description`.
    """
    text = _NO_TEXT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    packet = _parse(data if data and data.strip() else _NEW.encode())
    if packet.text == text:
        return packet.data
    changed = _changed(packet, text)
    if _parse(changed).text != text:
        raise ValueError(_UNKNOWN)
    return changed


def _changed(packet: _Packet, text: str) -> bytes:
    data = packet.data
    item, alt, own, inline = packet.item, packet.alt, packet.own, packet.inline
    if item and (item.has_elements or item.attribute(_RDF, "parseType")):
        raise ValueError(_UNKNOWN)
    if item and not item.is_empty:
        return data[: item.inside] + _encoded(packet, escape(text)) + data[item.close :]
    if item and alt:
        return data[: item.start] + _encoded(packet, _item(alt, text)) + data[item.end :]
    if alt:
        return _inserted(packet, alt, _item(alt, text))
    if own:
        return data[: own.start] + _encoded(packet, _property(own, text)) + data[own.end :]
    if inline:
        return _changed(_parse(_without_attribute(data, inline)), text)
    if packet.description:
        return _inserted(packet, packet.description, _property(packet.description, text))
    if packet.root is None:
        raise ValueError("holds no RDF, as XMP does")
    rdf, new = _prefix(packet.root, _RDF, "rdf")
    about = f'<{rdf}Description{new} {rdf}about="">'
    whole = f"{about}{_property(packet.root, text)}</{rdf}Description>"
    return _inserted(packet, packet.root, whole)


def _without_attribute(data: bytes, element: _Element) -> bytes:
    """The packet without the description that is an attribute."""
    name = (element.attribute(_DC, "description") or "").encode()
    for match in _ATTRIBUTE.finditer(data, element.start, element.inside):
        if match[1] == name:
            return data[: match.start()] + data[match.end() :]
    raise ValueError(_UNKNOWN)


def _inserted(packet: _Packet, element: _Element, xml: str) -> bytes:
    """The packet with something more in an element, as the first in it."""
    data, put = packet.data, _encoded(packet, xml)
    if not element.is_empty:
        return data[: element.inside] + put + data[element.inside :]
    close = _encoded(packet, f"</{element.name}>")
    return data[: element.inside - 2] + b">" + put + close + data[element.inside :]


def _property(element: _Element, text: str) -> str:
    """dc:description with a text, as it stands where an element's names are known."""
    dc, new_dc = _prefix(element, _DC, "dc")
    rdf, new_rdf = _prefix(element, _RDF, "rdf")
    item = f'<{rdf}li xml:lang="{_DEFAULT}">{escape(text)}</{rdf}li>'
    alt = f"<{rdf}Alt>{item}</{rdf}Alt>"
    return f"<{dc}description{new_dc}{new_rdf}>{alt}</{dc}description>"


def _item(alt: _Element, text: str) -> str:
    rdf, new = _prefix(alt, _RDF, "rdf")
    return f'<{rdf}li{new} xml:lang="{_DEFAULT}">{escape(text)}</{rdf}li>'


def _prefix(element: _Element, space: str, usual: str) -> tuple[str, str]:
    """What stands before names of a namespace, and what declares it if nothing has."""
    known = next((p for p, s in element.spaces.items() if s == space and p), None)
    return (f"{known}:", "") if known else (f"{usual}:", f' xmlns:{usual}="{space}"')


def _encoded(packet: _Packet, xml: str) -> bytes:
    is_utf8 = packet.encoding.lower() in ("utf-8", "utf8")
    return xml.encode("utf-8") if is_utf8 else xml.encode("ascii", "xmlcharrefreplace")


def _parse(data: bytes) -> _Packet:
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES:,} bytes, which no XMP needs")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise ValueError("is UTF-16 or UTF-32, expected UTF-8; save it so")
    packet = _Packet(data)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.XmlDeclHandler = lambda _, encoding, __: setattr(packet, "encoding", encoding or "utf-8")
    parser.StartDoctypeDeclHandler = _refuse_doctype
    parser.StartElementHandler = lambda name, attributes: _start(
        packet, parser.CurrentByteIndex, name, attributes
    )
    parser.EndElementHandler = lambda _: _end(packet, parser.CurrentByteIndex)
    parser.CharacterDataHandler = lambda text: _add(packet, text)
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"is no XMP: {error}") from error
    return packet


def _refuse_doctype(*_: Any) -> NoReturn:
    raise ValueError("has a document type, which no XMP needs")


def _start(packet: _Packet, start: int, name: str, attributes: Mapping[str, str]) -> None:
    if len(packet.stack) >= _MAX_DEPTH:
        raise ValueError(f"is nested more than {_MAX_DEPTH} deep, which no XMP needs")
    parent = packet.stack[-1] if packet.stack else None
    if parent:
        parent.has_elements = True
        if parent is _OTHER or name.rpartition(":")[2] != _PATH_NAMES[parent.level]:
            packet.stack.append(_OTHER)
            return
    tag = _START_TAG.match(packet.data, start)
    if tag is None:
        raise ValueError("is no XMP: a tag without an end")
    spaces = parent.spaces if parent else {"xml": _XML}
    declared = {n[6:]: uri for n, uri in attributes.items() if n.partition(":")[0] == "xmlns"}
    spaces = {**spaces, **declared} if declared else spaces
    if len(spaces) > _MAX_SPACES:
        raise ValueError(f"has more than {_MAX_SPACES} namespaces, which no XMP needs")
    is_empty = tag[0].endswith(b"/>")
    element = _Element(name, 0, spaces, attributes, start, tag.end(), is_empty)
    level = parent.level if parent else 0
    if element.resolve(name) == _PATH[level]:
        element.level = level + 1
    packet.stack.append(element if not parent or element.level else _OTHER)
    _note(packet, element)


def _note(packet: _Packet, element: _Element) -> None:
    """Keeps an element that a description may be in, or is."""
    if element.level == _ROOT:
        packet.root = packet.root or element
    elif element.level == _DESCRIPTION:
        packet.description = packet.description or element
        if element.attribute(_DC, "description"):
            packet.check_first()
            packet.inline = element
    elif element.level == _PROPERTY:
        packet.check_first()
        packet.own = element
    elif element.level == _ALT:
        packet.alt = packet.alt or element
    elif element.level == _ITEM:
        language = element.attribute(_XML, "lang")
        if language and element.attributes[language].lower() == _DEFAULT:
            packet.item = packet.item or element


def _add(packet: _Packet, text: str) -> None:
    """Keeps text that may be a description."""
    if packet.stack[-1] is packet.item:
        packet.item.parts.append(text)
    elif packet.own and not packet.own.end:
        packet.own.parts.append(text)


def _end(packet: _Packet, index: int) -> None:
    element = packet.stack.pop()
    if element is _OTHER:
        return
    if element.is_empty:
        element.end = element.inside
    else:
        element.close, element.end = index, packet.data.index(b">", index) + 1
