"""What to expect of several machines: the sums of the issue's 7B by hand, and the page's table."""

from __future__ import annotations

import re

import pytest

from mlx_llava.analysis.predict import Machine, mac
from mlx_llava.analysis.several import HOW, Load, Wire, advise, report
from tests.conftest import ROOT

#: Seconds of a short sum, and bytes a second of a long one, as the page has them.
RDMA, TCP = Wire(25e-6, 6e9), Wire(300e-6, 1e9)
#: Width, layers, heads, those of keys and values, hidden units, words, tiles, tokens of a prompt.
MODELS = {
    "1.5 7B": (4096, 32, 32, 32, 11008, 32064, 1, 593),
    "1.5 13B": (5120, 40, 40, 40, 13824, 32064, 1, 593),
    "1.6 34B": (7168, 60, 56, 8, 20480, 64064, 5, 2345),
}
WAYS = (
    (1, HOW[0], RDMA),
    (2, HOW[0], RDMA),
    (4, HOW[0], RDMA),
    (2, HOW[0], TCP),
    (2, HOW[1], TCP),
)


def load_of(name: str, bits: int) -> Load:
    """The load of a LLaVA with CLIP ViT-L/14-336; codes share a scale and a bias of 64."""
    D, layers, heads, kv_heads, hidden, words, tiles, L = MODELS[name]
    kv = D // heads * kv_heads
    layer = 2 * D * D + 2 * D * kv + 3 * D * hidden
    each = 2 if bits == 16 else (bits + 0.5) / 8
    head, tower = int(D * words * each), int(0.31e9 * 2)
    cache = 2 * 2 * layers * kv * L
    return Load(
        encode=tiles * 0.36e12,
        tiles=tiles,
        prefill=2.0 * L * layers * layer + 2.0 * layers * L * L * D,
        token=layers * layer * each + head + cache,
        whole=head,
        kernels=17 * layers,
        layers=layers,
        state=2 * D,
        length=L,
        weights=int(layers * layer * each) + 2 * head + tower,
        kept=2 * head + tower,
    )


def test_the_sums_of_a_7b_take_what_they_are_said_to():
    free = Machine(encode=1e30, prefill=1e30, read=1e30, kernel=0)
    for wire, seconds in ((RDMA, 1.6e-3), (TCP, 19.2e-3)):
        found = load_of("1.5 7B", 4).expect(free, Wire(wire.latency, 1e30), 2)
        assert 1 / found[HOW[0]]["tokens_per_second"] == pytest.approx(seconds)
        assert 1 / found[HOW[1]]["tokens_per_second"] == pytest.approx(2 * wire.latency)


def test_one_machine_has_nothing_between():
    load, machine = load_of("1.5 7B", 4), mac("M4 Max")
    shared, piped = load.expect(machine, TCP, 1).values()
    assert shared == pytest.approx(piped)
    assert shared["tokens_per_second"] == pytest.approx(
        1 / (load.token / machine.read + load.kernels * machine.kernel)
    )
    assert shared["weights_gb"] == load.weights / 1e9


def test_the_table_of_the_page_is_what_is_calculated():
    page = (ROOT / "docs" / "several-macs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+ \d+B), (\d+) bits \| (.*) \|$", page, re.MULTILINE)
    assert {(name, bits) for name, bits, _ in rows} == {(n, b) for n in MODELS for b in ("4", "16")}
    for name, bits, cells in rows:
        load = load_of(name, int(bits))
        assert cells.split(" | ") == [cell(load, *way) for way in WAYS]


def cell(load: Load, n: int, how: str, wire: Wire) -> str:
    found = load.expect(mac("M4 Max"), wire, n)[how]
    return (
        f"{found['first_token']:.1f} s, {found['tokens_per_second']:.0f}/s, "
        f"{found['weights_gb']:.0f} GB"
    )


@pytest.mark.parametrize(
    ("rates", "fits", "said"),
    [
        ([9, 9, 12, 3], "1111", "Best: 2 ranks, tensor parallel."),
        ([9, 9, 3, 12], "1111", "Best: 2 ranks, pipeline (--pipeline)."),
        ([9, 9, 3, 8], "1111", "One machine alone is fastest"),
        ([9, 9, 3, 8], "0011", "Best: 2 ranks, pipeline (--pipeline)."),
        ([9, 9, 3, 8], "0000", "The weights do not fit 2 ranks"),
    ],
)
def test_what_is_fastest_of_what_fits_is_advised(rates, fits, said):
    ways = [(n, how) for n in (1, 2) for how in HOW]
    rows = [
        {"ranks": n, "how": how, "tokens_per_second": rate, "fits": fit == "1"}
        | {"first_token": 1.0, "weights_gb": 2.0}
        for (n, how), rate, fit in zip(ways, rates, fits, strict=True)
    ]
    assert advise(rows).startswith(said)
    lines = [*report(TCP, rows)]
    assert lines[0] == "an all_sum of 4 KB takes 300 us, of 16 MB 17.1 ms, 1.00 GB/s"
    assert lines[1] == "a 7B, tensor parallel, has 64 of them a token: 19.2 ms"
    assert [line.split()[:2] for line in lines[3:-1]] == [
        *(["1", "alone"], ["2", "tensor"], ["2", "pipeline"]),
    ]
