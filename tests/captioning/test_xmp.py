"""Descriptions in XMP: read back by rdflib, with every other byte as it was."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llava.captioning import xmp
from mlx_llava.captioning.xmp import read_description, with_description

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"


def packet(inside: str, more: str = "") -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}">{inside}</rdf:RDF>'
        f"{more}</x:xmpmeta>"
    ).encode()


def description(inside: str, attributes: str = "") -> bytes:
    return packet(
        f'<rdf:Description rdf:about="" xmlns:dc="{DC}" xmlns:q="urn:q" q:rating="4"{attributes}>'
        f'<q:sliders>a &amp; b<!-- "kept" --></q:sliders>{inside}</rdf:Description>'
    )


def alt(inside: str) -> str:
    return f"<dc:description><rdf:Alt>{inside}</rdf:Alt></dc:description>"


def item(text: str, language: str = "x-default") -> str:
    return f'<rdf:li xml:lang="{language}">{text}</rdf:li>'


EMPTY = '<rdf:li xml:lang="x-default"/>'

#: Packets, and what of each is gone when it has another description.
PACKETS = {
    "nothing": (packet(""), ""),
    "RDF that is empty": (packet("").replace(b"></rdf:RDF>", b"/>"), ""),
    "properties": (description(""), ""),
    "attributes alone": (packet('<rdf:Description rdf:about="" a:b="/>" xmlns:a="urn:a"/>'), ""),
    "a byte-order mark": (b"\xef\xbb\xbf" + description(""), ""),
    "another default namespace": (
        f'<RDF xmlns="{RDF}"><Description r:about="" xmlns:r="{RDF}"/></RDF>'.encode(),
        "",
    ),
    "another prefix": (
        f'<RDF xmlns="{RDF}" xmlns:e="{DC}"><Description><e:title/></Description></RDF>'.encode(),
        "",
    ),
    "dc of another namespace": (
        packet('<rdf:Description xmlns:dc="urn:other"><dc:description>x</dc:description>'
               "</rdf:Description>"),
        "",
    ),
    "a description": (description(alt(item("old &lt;"))), "old &lt;"),
    "in two languages": (description(alt(item("alt", "de") + item("old"))), "old"),
    "in another language": (description(alt(item("alt", "de-DE"))), ""),
    "no language": (description(alt("")), ""),
    "an empty one": (description("<dc:description><rdf:Alt/></dc:description>"), ""),
    "an empty item": (description(alt(EMPTY)), EMPTY),
    "X-Default": (description(alt(item("old", "X-Default"))), "old"),
    "a plain text": (
        description("<dc:description>old</dc:description>"),
        "<dc:description>old</dc:description>",
    ),
    "an attribute": (
        description("", " q:x=' dc:description=\"not this\"' dc:description='old'"),
        " dc:description='old'",
    ),
    "latin-1": (
        b'<?xml version="1.0" encoding="ISO-8859-1"?>\n'
        + description(alt(item("old"))).partition(b"\n")[2].replace(b"kept", b"b\xe4r"),
        "old",
    ),
    "the second of several": (
        packet('<rdf:Description xmlns:a="urn:a" a:b="1"/>'
               f'<rdf:Description xmlns:dc="{DC}">{alt(item("old"))}</rdf:Description>'),
        "old",
    ),
}  # fmt: skip


def read_independently(data: bytes) -> set[str]:
    """The descriptions without a language or in the default one, as rdflib has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own
        from rdflib import Graph, Literal, URIRef

        text = data.decode("latin-1" if b"8859" in data else "utf-8-sig")
        begin = text.index("<RDF" if "<RDF" in text else "<rdf:RDF")
        end = max(text.rfind("</RDF>") + 6, text.rfind("</rdf:RDF>") + 10)
        graph = Graph().parse(data=text[begin:end], format="xml", publicID="urn:x")
        found = {
            str(value)
            for _, place in graph.subject_objects(URIRef(DC + "description"))
            for value in ([place] if isinstance(place, Literal) else graph.objects(place))
            if isinstance(value, Literal) and (value.language or "x-default").lower() == "x-default"
        }
    return found


@pytest.mark.parametrize("name", PACKETS)
@pytest.mark.parametrize("text", ["A <red> circle\n& \u201cmore\u201d \U0001f600]]>", "old"])
def test_what_is_written_is_read_and_the_rest_stays(name, text):
    before, gone = PACKETS[name]
    after = with_description(before, text)
    assert read_description(after) == text
    assert read_independently(after) == {text}
    assert with_description(after, text) == after
    # All that was there is there in the same order, but for what was replaced.
    rest = iter(after)
    kept = before.replace(gone.encode(), b"", 1) if gone else before
    kept = kept.replace(b"/>", b">") if after.count(b"/>") < before.count(b"/>") else kept
    assert all(byte in rest for byte in kept)


def test_packets_of_some_megabytes():
    euros = "\u20ac" * 99
    long = "".join(f"<q:mask n='{n}'>{euros}</q:mask>" for n in range(9000))
    before = description(f"{long}{alt(item('old'))}{long}")
    assert len(before) > 5_000_000
    assert with_description(before, "new") == before.replace(b">old<", b">new<")


def test_a_new_packet():
    data = with_description(None, "A star.")
    assert data.startswith(b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\n')
    assert read_independently(data) == {"A star."}
    assert with_description(b" \n", "A star.") == data


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text(first, second):
    for data in (None, with_description(None, first)):
        after = with_description(data, second)
        assert (read_description(after) or "") == xmp._NO_TEXT.sub(
            "", second.replace("\r\n", "\n").replace("\r", "\n")
        ).strip()


HOSTILE = {
    "entities": (
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + packet("&b;"),
        "has a document type",
    ),
    "a file": (
        b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + packet("&a;"),
        "has a document type",
    ),
    "an unknown entity": (packet("&a;"), "is no XMP: undefined entity"),
    "depth": (b"<a>" * 100_000, "is nested more than 200 deep"),
    "size": (b"<a>" + b" " * xmp.MAX_BYTES, "which no XMP needs"),
    "namespaces": (
        b"<a %s><b/></a>" % b" ".join(b"xmlns:a%d='b'" % n for n in range(300)),
        "has more than 200 namespaces",
    ),
    "UTF-16": (packet("").decode().encode("utf-16"), "is UTF-16"),
    "an end": (packet("")[:-5], "is no XMP: unclosed token"),
    "another file": (b"\xff\xd8\xff\xe0", "is no XMP"),
    "other XML": (b"<svg/>", "holds no RDF"),
    "two": (description(alt("") + alt("")), "has two descriptions"),
    "two forms": (description(alt(""), " dc:description='x'"), "has two descriptions"),
    "a structure": (
        description(alt('<rdf:li xml:lang="x-default"><rdf:value>x</rdf:value></rdf:li>')),
        "in a form that is not known",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_refused(name):
    data, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message):
        with_description(data, "x")
