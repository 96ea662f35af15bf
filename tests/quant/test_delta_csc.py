"""delta-CSC against a decoder written out by hand, its size against the formula, and damaged files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from specdec.errors import InputError
from specdec.quant import delta_csc, delta_files, parse
from specdec.quant.delta_csc import Half, compress, expand
from specdec.quant.delta_files import MANIFEST, Matrix
from specdec.quant.delta_streams import GAPS, decode, encode
from specdec.quant.sparse import keep_largest

MX = ["mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "mxfp8_e4m3"]
FORMATS = ["float16", "bfloat16", "sparse-60", "sparse-2x4", "int8", *MX]


def format_of(name):
    return Half(getattr(torch, name)) if name in ("float16", "bfloat16") else parse(name)


def pruned(N: int, K: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    return weight * keep_largest(torch.rand(N, K, generator=generator), max(1, round(K * (1 - sparsity))))


def codes(stream: torch.Tensor, bits: int, count: int) -> list[int]:
    whole = int.from_bytes(bytes(stream.tolist()), "little")
    return [whole >> (bits * i) & ((1 << bits) - 1) for i in range(count)]


def by_hand(stored: dict[str, torch.Tensor], K: int, gap: int) -> list[list[float]]:
    """The rule of the format, entry by entry."""
    values, counts = stored["values"].tolist(), stored["counts"].tolist()
    gaps = iter(codes(stored["gaps"], gap, len(values)))
    entries = iter(values)
    columns = []
    for count in counts:
        column: list[float] = []
        for _ in range(count):
            column += [0] * next(gaps) + [next(entries)]
        columns.append(column + [0] * (K - len(column)))
    return columns


# ---------------------------------------------------------------- the streams


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(GAPS)),
    st.lists(st.lists(st.integers(0, 70), max_size=6), min_size=1, max_size=5),
    st.integers(0, 70),
    st.sampled_from([torch.float16, torch.bfloat16, torch.int8, torch.uint8]),
)
def test_any_gaps_come_back(gap, gaps, trailing, dtype):
    """Columns made of runs of zeros, a value behind each; some are empty."""
    columns = [[value for i, run in enumerate(runs) for value in [0] * run + [i % 100 + 1]] for runs in gaps]
    K = max(1, max(map(len, columns)) + trailing)
    dense = torch.tensor([column + [0] * (K - len(column)) for column in columns]).to(dtype)
    stored = encode(dense, gap)
    assert by_hand(stored, K, gap) == dense.tolist()
    assert torch.equal(decode(stored, *dense.shape, gap), dense)
    assert stored["values"].dtype == dtype


@pytest.mark.parametrize(
    ("zeros", "expected"),
    [(0, [0]), (15, [15]), (16, [15, 0]), (17, [15, 1]), (31, [15, 15]), (32, [15, 15, 0]), (47, [15, 15, 15])],
)
def test_a_dummy_stands_for_sixteen_zeros(zeros, expected):
    """The 16th zero of a run is the dummy itself."""
    dense = torch.zeros(1, 64, dtype=torch.int8)
    dense[0, zeros] = 7
    stored = encode(dense, 4)
    assert codes(stored["gaps"], 4, len(expected)) == expected
    assert stored["values"].tolist() == [0] * (len(expected) - 1) + [7]
    assert stored["counts"].tolist() == [len(expected)]  # dummies count
    assert torch.equal(decode(stored, 1, 64, 4), dense)


def test_columns_of_zeros_and_trailing_zeros_cost_their_counts_alone():
    dense = torch.zeros(5, 4096, dtype=torch.int8)
    dense[1, 0], dense[3, 4095] = 1, 2
    stored = encode(dense, 6)
    assert stored["counts"].tolist() == [0, 1, 0, 64, 0]
    assert torch.equal(decode(stored, 5, 4096, 6), dense)
    nothing = encode(torch.zeros(3, 100, dtype=torch.bfloat16), 4)
    assert [len(nothing[part]) for part in ("values", "gaps", "counts")] == [0, 0, 3]
    assert not decode(nothing, 3, 100, 4).any()


def test_counts_are_wider_only_where_a_column_may_need_it():
    short, long = torch.ones(1, 65535, dtype=torch.int8), torch.ones(1, 65536, dtype=torch.int8)
    assert encode(short)["counts"].dtype == torch.uint16
    assert encode(short)["counts"].tolist() == [65535]
    assert encode(long)["counts"].dtype == torch.int32
    assert torch.equal(decode(encode(long), 1, 65536, 4), long)


@pytest.mark.parametrize("gap", GAPS)
def test_gaps_take_just_their_bits(gap):
    stored = encode(torch.ones(3, 7, dtype=torch.int8), gap)
    assert len(stored["gaps"]) == -(-21 * gap // 8)


# ---------------------------------------------------------------- wrong ways, which must be seen


def test_negative_control_dummy_after_sixteen_zeros():
    """An encoder that lets 16 zeros pass before a dummy, and the dummy be a 17th."""
    dense = torch.zeros(1, 64, dtype=torch.int8)
    dense[0, 20] = 7
    right, wrong = encode(dense, 4), {"values": torch.tensor([0, 7], dtype=torch.int8)}
    wrong |= {"gaps": torch.tensor([15 | 3 << 4], dtype=torch.uint8), "counts": right["counts"]}
    assert codes(right["gaps"], 4, 2) == [15, 4]
    assert not torch.equal(decode(wrong, 1, 64, 4), dense)


def test_negative_control_counts_without_dummies():
    dense = torch.zeros(2, 64, dtype=torch.int8)
    dense[0, 40], dense[1, 3] = 7, 8
    stored = encode(dense, 4)
    assert stored["counts"].tolist() == [3, 1]
    stored["counts"] = torch.tensor([1, 1], dtype=torch.uint16)
    with pytest.raises(InputError, match="as the counts say"):
        decode(stored, 2, 64, 4)
    # With as many entries in all, the dummies are taken for the ends of columns.
    stored["counts"] = torch.tensor([1, 3], dtype=torch.uint16)
    with pytest.raises(InputError, match="a zero that no gap needs"):
        decode(stored, 2, 64, 4)


@pytest.mark.parametrize("gap", [2, 3, 5, 6])
def test_another_gap_width_is_seen(gap):
    stored = encode(pruned(16, 256, 0.8).bfloat16(), 4)
    with pytest.raises(InputError, match="another gap width"):
        decode(stored, 16, 256, gap)


def test_a_column_that_ends_one_input_too_late_is_refused():
    """It would write into the next."""
    dense = torch.zeros(2, 10, dtype=torch.int8)
    dense[0, 9] = dense[1, 3] = 5
    stored = encode(dense, 4)
    assert stored["gaps"].tolist() == [9 | 3 << 4]
    stored["gaps"] = torch.tensor([10 | 3 << 4], dtype=torch.uint8)
    with pytest.raises(InputError, match="reach input 11 of 10"):
        decode(stored, 2, 10, 4)


def test_streams_end_on_zero_bits():
    stored = encode(torch.ones(1, 3, dtype=torch.int8), 4)
    stored["gaps"][-1] |= 0x80
    with pytest.raises(InputError, match="does not end on zero bits"):
        decode(stored, 1, 3, 4)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gap", GAPS)
def test_parts_come_back_bit_by_bit(name, gap):
    format = format_of(name)
    weight = pruned(37, 160, 0.8)
    weight[5] = 0
    weight[:, 130:] = 0
    parts = format.pack(weight)
    stored = compress(format, parts, 37, 160, gap)
    assert {part: tensor.dtype for part, tensor in stored.items()} == delta_csc.tensors_of(format, 37, 160)
    back = expand(format, stored, 37, 160, gap)
    assert set(back) == set(parts)
    assert torch.equal(format.unpack(back), format.unpack(parts))
    if name == "sparse-60":
        assert all(torch.equal(back[part], parts[part]) for part in parts)
    again = compress(format, back, 37, 160, gap)
    assert all(torch.equal(again[part].reshape(-1), stored[part].reshape(-1)) for part in stored)


@pytest.mark.parametrize("name", ["float16", "mxfp6_e2m3", "mxfp4"])
def test_negative_zeros_are_zeros(name):
    format = format_of(name)
    weight = pruned(8, 64, 0.7)
    mirrored = torch.where(weight == 0, -0.0, weight)
    plus, minus = (compress(format, format.pack(w), 8, 64) for w in (weight, mirrored))
    assert all(torch.equal(plus[part], minus[part]) for part in plus)


def test_formats_without_a_zero_are_refused():
    format = parse("int4-asym")
    with pytest.raises(InputError, match="not int4-asym"):
        compress(format, format.pack(torch.ones(4, 32)), 4, 32)
    with pytest.raises(InputError, match=r"not torch\.float32; convert"):
        Matrix.of_weight(torch.ones(4, 32))
    with pytest.raises(InputError, match="NaN"):
        Matrix.of_weight(torch.full((4, 32), torch.nan).half())
    with pytest.raises(InputError, match="2 to 6 bits, not 7"):
        compress(parse("int8"), parse("int8").pack(torch.ones(4, 32)), 4, 32, gap=7)


def test_more_values_than_a_sparse_row_keeps_are_refused():
    """What was stored as another format would lose its smallest weights."""
    dense = parse("sparse-10").pack(torch.ones(2, 64))
    stored = compress(parse("sparse-10"), dense, 2, 64)
    with pytest.raises(InputError, match="more than the format keeps"):
        expand(parse("sparse-60"), stored, 2, 64, name="up_proj")


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("sparsity", [0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8", "mxfp6_e2m3"])
def test_the_size_is_that_of_the_formula(name, sparsity):
    format, N, K = format_of(name), 64, 4096
    parts = format.pack(pruned(N, K, sparsity))
    actual = 1 - torch.count_nonzero(format.unpack(parts)).item() / (N * K)  # rounding makes more zeros
    for gap in GAPS:
        stored = compress(format, parts, N, K, gap)
        size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        assert size == pytest.approx(delta_csc.expected_bytes(format, actual, N, K, gap), rel=0.01)


@pytest.mark.parametrize(
    ("sparsity", "gap", "bits", "ratio"),
    [(0.8, 4, 16, 3.89), (0.6, 4, 16, 2.0), (0.9, 5, 16, 7.33), (0.95, 6, 16, 14.0), (0.8, 4, 8, 6.48)],
)
def test_ratios_to_sixteen_bits(sparsity, gap, bits, ratio):
    """Of random masks of 4096 rows, measured with another encoder."""
    assert 16 / delta_csc.expected_bits(sparsity, bits, gap) == pytest.approx(ratio, rel=0.01)


def test_the_formula_in_short_columns_counts_their_ends():
    """All matrices of three columns' worth of masks, each with its probability."""
    K, gap, sparsity = 11, 2, 0.7
    expected = 0.0
    for mask in range(1 << K):
        dense = torch.tensor([[mask >> i & 1 for i in range(K)]], dtype=torch.int8)
        ones = mask.bit_count()
        stored = int(encode(dense, gap)["counts"][0])
        expected += sparsity ** (K - ones) * (1 - sparsity) ** ones * (stored * (8 + gap) + 16) / K
    assert delta_csc.expected_bits(sparsity, 8, gap, K) == pytest.approx(expected, rel=1e-12)


def test_the_best_gap_and_when_a_bitmask_is_smaller():
    assert [delta_csc.best_gap(s) for s in (0.3, 0.6, 0.8, 0.9, 0.95)] == [2, 3, 4, 5, 6]
    for sparsity in (0.5, 0.7, 0.9):
        matrices = {gap: Matrix.of_weight(pruned(32, 2048, sparsity).half(), gap).num_bytes for gap in GAPS}
        assert Matrix.of_weight(pruned(32, 2048, sparsity).half()).num_bytes == min(matrices.values())
    assert [delta_csc.smaller_storage(s) for s in (0.5, 0.76, 0.8, 0.95)] == ["bitmask", "bitmask"] + ["delta-csc"] * 2
    assert delta_csc.bitmask_bits(0.8) == pytest.approx(4.2)
    with pytest.raises(InputError, match="from 0 to 1"):
        delta_csc.expected_bits(80)


# ---------------------------------------------------------------- files


@pytest.fixture
def matrices():
    made = {f"layers.{i}": (format_of(name), pruned(24, 96, 0.8, i)) for i, name in enumerate(FORMATS)}
    return {name: Matrix.of(format, format.pack(weight), 24, 96) for name, (format, weight) in made.items()}


def test_a_file_comes_back(matrices, tmp_path):
    path = tmp_path / "pruned.safetensors"
    delta_files.save(path, matrices)
    back = delta_files.load(path)
    assert list(back) == list(matrices)
    for name, matrix in matrices.items():
        assert (back[name].format, back[name].gap) == (matrix.format, matrix.gap)
        assert back[name].num_bytes == matrix.num_bytes
        expected = matrix.parts()
        assert all(torch.equal(part, expected[key]) for key, part in back[name].parts().items())


def rewrite(path, change_tensors=None, change_manifest=None, sums=True):
    """Change a file as somebody would who knows its checksums."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        manifest = json.loads(file.metadata()[MANIFEST])
    if change_tensors:
        change_tensors(tensors)
    if change_manifest:
        manifest = change_manifest(manifest) or manifest
    if sums:
        for name, entry in manifest.get("matrices", {}).items():
            entry["crc32"] = {
                part: delta_files._crc32(tensors[f"{name}.weight_{part}"])
                for part in entry["crc32"]
                if f"{name}.weight_{part}" in tensors
            }
    save_file(tensors, path, {MANIFEST: json.dumps(manifest)})


def change(name, function):
    def apply(tensors):
        tensors[name] = function(tensors[name])

    return apply


def _nan(values):
    values[0] = torch.nan
    return values


def _zero(values):
    values[-1] = 0
    return values


def _longest(gaps):
    return torch.full_like(gaps, 255)


@pytest.mark.parametrize(
    ("tensor", "function", "match"),
    [
        ("m.weight_values", lambda v: v[:-1], "'values' of m .*as the counts say"),
        ("m.weight_values", lambda v: torch.cat([v, v[:1]]), "'values' of m .*as the counts say"),
        ("m.weight_values", lambda v: v.float(), "'values' of m .*bfloat16; found torch.float32"),
        ("m.weight_values", _nan, "'values' of m .*NaN"),
        ("m.weight_values", _zero, "'values' of m .*a zero that no gap needs"),
        ("m.weight_gaps", lambda g: g[:-1], "'gaps' of m .*found torch.uint8"),
        ("m.weight_gaps", lambda g: torch.cat([g, g[:1]]), "'gaps' of m .*found torch.uint8"),
        ("m.weight_gaps", _longest, "'gaps' of m .*(of 96 in one column|zero bits)"),
        ("m.weight_counts", lambda c: c[:-1], r"'counts' of m .*is \[24\]; found \[23\]"),
        ("m.weight_counts", lambda c: torch.full_like(c, 97), "'counts' of m .*97 stored values in a column of 96"),
        ("m.weight_counts", lambda c: c.int(), "'counts' of m .*uint16; found torch.int32"),
    ],
)
def test_damaged_streams_name_the_tensor(tmp_path, tensor, function, match):
    """Also where the checksums are right."""
    path = tmp_path / "m.safetensors"
    delta_files.save(path, {"m": Matrix.of_weight(pruned(24, 96, 0.8).bfloat16())})
    rewrite(path, change(tensor, function))
    with pytest.raises(InputError, match=match):
        delta_files.load(path)


@pytest.mark.parametrize("part", ["values", "gaps", "counts", "scales"])
def test_one_flipped_bit_is_seen(tmp_path, part):
    path = tmp_path / "m.safetensors"
    format = parse("mxfp6_e2m3")
    delta_files.save(path, {"m": Matrix.of(format, format.pack(pruned(24, 96, 0.8)), 24, 96)})

    def flip(tensor):
        tensor = tensor.clone()
        tensor.view(torch.uint8).view(-1)[3] ^= 4
        return tensor

    rewrite(path, change(f"m.weight_{part}", flip), sums=False)
    with pytest.raises(InputError, match=f"m.weight_{part} of .* checksum differs"):
        delta_files.load(path)


def _entry(**changes):
    return lambda manifest: manifest["matrices"]["m"].update(changes)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (_entry(inputs=2**40), "'inputs' of m"),
        (_entry(outputs=-1), "'outputs' of m"),
        (_entry(outputs=True), "'outputs' of m"),
        (_entry(inputs=31), "of 31"),
        (_entry(gap=9), "'gap' of m"),
        (_entry(gap="4"), "'gap' of m"),
        (_entry(format="int4-asym"), "not int4-asym"),
        (_entry(format="float64"), "no weight format"),
        (_entry(format=["float16"]), "names no format"),
        (_entry(format="int8"), "lacks m.weight_scales|is torch.int8"),
        (_entry(extra=1), "is damaged"),
        (lambda m: {"version": 1, "matrices": {}}, "m.weight_counts, of which"),
        (lambda m: {**m, "version": 2}, "version 2"),
        (lambda m: {"version": 1}, "lists no matrices"),
    ],
)
def test_manifests_that_do_not_fit(tmp_path, changed, match):
    path = tmp_path / "m.safetensors"
    delta_files.save(path, {"m": Matrix.of_weight(pruned(24, 96, 0.8).bfloat16())})
    rewrite(path, change_manifest=changed)
    with pytest.raises(InputError, match=match):
        delta_files.load(path)


def test_files_that_are_none(tmp_path, matrices):
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="cannot read"):
        delta_files.load(path)
    delta_files.save(path, matrices)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot read"):
            delta_files.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(InputError, match="no manifest"):
        delta_files.load(path)
    save_file({"a": torch.ones(2)}, path, {MANIFEST: "{"})
    with pytest.raises(InputError, match=r"manifest of .* is damaged"):
        delta_files.load(path)
    with pytest.raises(InputError, match="no matrices to save"):
        delta_files.save(path, {})
    with pytest.raises(InputError, match="cannot write"):
        delta_files.save(tmp_path / "none" / "m.safetensors", matrices)
