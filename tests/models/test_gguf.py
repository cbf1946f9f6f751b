"""GGUF: reading and dequantisation bit for bit as the gguf package, and hostile files."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize as their_dequantize
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ModelError
from octavo.models.gguf import BLOCKS, GgufFile
from octavo.models.gguf_blocks import PLAIN, dequantize, read_tensor

QUANTISED = [kind for kind in BLOCKS if kind not in PLAIN]
HALVES = {  # where a block keeps its float16 scales
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes, with scales that are finite numbers."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, BLOCKS[kind][1]), dtype=np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = rng.normal(0, 3, count).astype(np.float16).view(np.uint8).reshape(count, 2)
    return blocks


def assert_same_bits(ours: torch.Tensor, theirs: np.ndarray) -> None:
    assert ours.dtype == torch.float32
    assert np.array_equal(ours.numpy().view(np.uint32).ravel(), theirs.view(np.uint32).ravel())


# Dequantisation


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("count", [1, 3, 4097])
def test_random_blocks_bit_for_bit(kind: str, count: int) -> None:
    blocks = random_blocks(kind, count)
    theirs = their_dequantize(blocks, Type[kind])
    assert_same_bits(dequantize(torch.from_numpy(blocks).view(-1), kind), theirs)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_data_bit_for_bit(kind: str) -> None:
    """What the package's own quantiser writes, subnormal scales and zeros included."""
    rng = np.random.default_rng(1)
    data = rng.normal(0, 1, (40, 256)).astype(np.float32) * np.logspace(-9, 3, 40, dtype=np.float32)[:, None]
    data[7] = 0
    packed = quantize(data, Type[kind])
    ours = dequantize(torch.from_numpy(packed).reshape(-1), kind).view(40, 256)
    assert_same_bits(ours, their_dequantize(packed, Type[kind]))
    loose = {"Q8_0": 0.01, "Q4_0": 0.15, "Q4_1": 0.15, "Q5_0": 0.08, "Q5_1": 0.08}[kind]
    rows = np.abs(data).max(axis=1) > 1e-3  # a float16 scale cannot follow smaller ones
    error = np.abs(ours.numpy() - data).max(axis=1) / np.maximum(np.abs(data).max(axis=1), 1e-30)
    assert error[rows].max() < loose


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_scale_that_is_not_finite_spoils_its_block_alone(kind: str) -> None:
    blocks = random_blocks(kind, 3)
    at = HALVES[kind][0]
    blocks[1, at : at + 2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    ours = dequantize(torch.from_numpy(blocks).view(-1), kind).view(3, -1)
    assert ours[0].isfinite().all()
    assert ours[2].isfinite().all()
    assert not ours[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shorter_types_are_the_exact_values_rounded_once(dtype: torch.dtype) -> None:
    raw = torch.from_numpy(random_blocks("Q4_1", 50)).view(-1)
    assert torch.equal(dequantize(raw, "Q4_1", dtype), dequantize(raw, "Q4_1").to(dtype))


@pytest.mark.parametrize("kind", QUANTISED)
def test_pieces_of_any_size_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.from_numpy(random_blocks(kind, 37)).view(-1)
    whole = dequantize(raw, kind)
    for chunk in (1, 300, 4096):
        monkeypatch.setattr("octavo.models.gguf_blocks.CHUNK", chunk)
        assert torch.equal(dequantize(raw, kind), whole)


# Files


def write_file(path: Path, *, tensors: dict[str, tuple[np.ndarray, Any]] | None = None, **values: Any) -> Path:
    """A file by the package's writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    for key, value in values.items():
        name = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_int32(name, value)
    for name, (data, kind) in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sample_tensors() -> dict[str, tuple[np.ndarray, Any]]:
    """One tensor of every type."""
    rng = np.random.default_rng(2)
    plain = rng.normal(0, 1, (3, 5)).astype(np.float32)
    found: dict[str, tuple[np.ndarray, Any]] = {
        "f32": (plain, None), "f16": (plain.astype(np.float16), None),
        "bf16": (quantize(plain, Type.BF16), Type.BF16), "vector": (plain[0].copy(), None),
        "cube": (rng.normal(0, 1, (2, 3, 4)).astype(np.float32), None),
    }
    for kind in QUANTISED:
        elements, width = BLOCKS[kind]
        rows = random_blocks(kind, 2 * 3).reshape(2, 3 * width)
        assert rows.shape[1] // width * elements == 3 * elements
        found[kind.lower()] = (rows, Type[kind])
    return found


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return write_file(
        tmp_path / "sample.gguf", tensors=sample_tensors(), tokenizer__tokens=["a", "é", "", "<|end|>"],
        scores=[0.5, -2.0], types=[1, 2, -3], name="ünïcode", factor=1.5, flag=True, small=-7, flags=[True, False],
    )


def test_metadata_and_tensors_as_the_package_reads_them(sample: Path) -> None:
    ours, theirs = GgufFile(sample), gguf.GGUFReader(sample)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == expected.keys()
    for key, value in expected.items():
        found = ours.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == value, key
        assert type(found) in (int, float, bool, str, list, np.ndarray)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        info = ours.tensors[t.name]
        assert info.type == t.tensor_type.name
        assert info.shape == tuple(int(n) for n in reversed(t.shape))
        assert (info.start, info.num_bytes) == (t.data_offset, t.n_bytes)
        values = read_tensor(ours, t.name)
        assert values.shape == info.shape
        assert_same_bits(values.float(), their_dequantize(np.array(t.data), t.tensor_type))


def test_plain_types_come_as_they_are_stored_and_quantised_ones_as_asked(sample: Path) -> None:
    file = GgufFile(sample)
    for dtype in (torch.float32, torch.bfloat16):
        assert [read_tensor(file, n.lower(), dtype).dtype for n in PLAIN] == [*PLAIN.values()]
        assert read_tensor(file, "q4_k", dtype).dtype == dtype


def test_a_tensor_outlives_its_file(sample: Path) -> None:
    tensor = read_tensor(GgufFile(sample), "f32")
    sample.unlink()
    assert tensor.isfinite().all()


def test_writing_to_a_tensor_does_not_write_to_the_file(sample: Path) -> None:
    before = sample.read_bytes()
    read_tensor(GgufFile(sample), "f32").fill_(9.0)
    assert sample.read_bytes() == before


@pytest.mark.parametrize("alignment", [8, 64])
def test_other_alignments(alignment: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_tensor(GgufFile(tmp_path / "x.gguf"), "b").tolist() == [0, 1, 2, 3, 4]


def test_cut_anywhere_it_is_a_model_error(sample: Path) -> None:
    whole = sample.read_bytes()
    last = GgufFile(sample).tensors["q6_k"]
    end_of_data = last.start + last.num_bytes
    assert end_of_data > 3000
    for end in [*range(3000), *range(3000, end_of_data, 41), end_of_data - 1]:
        sample.write_bytes(whole[:end])
        with pytest.raises(ModelError, match=r"sample\.gguf"):
            GgufFile(sample)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_model_error_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes of the header overwritten at random: refused by name, or still a file whose tensors can be read."""
    folder = tmp_path_factory.mktemp("damage")
    ones = np.ones((2, 4), np.float32)
    path = write_file(folder / "x.gguf", tensors={"a": (ones, None)}, words=["x", "yy"], n=[1, 2])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 33))] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 255]))
    path.write_bytes(content)
    try:
        file = GgufFile(path)
    except ModelError as error:
        assert "x.gguf" in str(error)
        return
    for name in file.tensors:
        read_tensor(file, name)


# Files made by hand


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def by_hand(
    values: list[bytes] | None = None, tensors: list[bytes] | None = None, *, version: int = 3, data: int = 64,
    counts: tuple[int, int] | None = None,
) -> bytes:
    values, tensors = values or [], tensors or []
    num_tensors, num_values = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = (1 << 64) - 1
GOOD = tensor("t", [4], 0, 0)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(version: int, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(by_hand([text("k") + struct.pack("<IB", 7, 1)], [GOOD], version=version))
    file = GgufFile(path)
    assert file.metadata == {"k": True}
    assert read_tensor(file, "t").tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"GGML" + bytes(60), "does not begin with GGUF"),
        (by_hand(version=1), "version 1 "),
        (by_hand(version=4), "version 4 "),
        (by_hand(version=3 << 24), "big-endian"),
        (by_hand(counts=(HUGE, 0)), "truncated"),
        (by_hand(counts=(0, HUGE)), "truncated"),
        (by_hand(counts=(HUGE, HUGE)), "truncated"),
        (by_hand([struct.pack("<Q", HUGE)], counts=(0, 1)), "truncated"),
        (by_hand([text("k") + struct.pack("<IQ", 8, HUGE)]), "truncated"),
        (by_hand([text("k") + struct.pack("<IIQ", 9, 0, HUGE)]), "truncated"),
        (by_hand([text("k") + struct.pack("<IIQ", 9, 8, 1 << 61)]), "truncated"),
        (by_hand([text("k") + struct.pack("<IIQQ", 9, 8, 3, 1000)]), "truncated inside k"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2) + text("a") + bytes(7),
         "truncated inside k"),
        (by_hand([text("k") + struct.pack("<IIQQ", 9, 8, 1, 1) + b"\xff"]), "k holds a string that is not UTF-8"),
        (by_hand([text("k") + struct.pack("<IIQ", 9, 9, 1)]), "array of arrays"),
        (by_hand([text("k") + struct.pack("<II", 99, 0)]), "unknown value type 99"),
        (by_hand([text("k") + struct.pack("<IIQ", 9, 99, 1)]), "unknown value type 99"),
        (by_hand([text("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe"]), "UTF-8"),
        (by_hand([struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 7, 1)]), "UTF-8"),
        (by_hand([text("k") + struct.pack("<IB", 7, 1)] * 2), "'k' appears twice"),
        (by_hand([text("general.alignment") + struct.pack("<II", 4, 0)]), "alignment"),
        (by_hand([text("general.alignment") + struct.pack("<II", 4, 33)]), "alignment"),
        (by_hand([text("general.alignment") + struct.pack("<I", 8) + text("32")]), "alignment"),
        (by_hand(tensors=[GOOD, GOOD]), "'t' appears twice"),
        (by_hand(tensors=[tensor("t", [], 0, 0)]), "0 dimensions"),
        (by_hand(tensors=[tensor("t", [1] * 5, 0, 0)]), "5 dimensions"),
        (by_hand(tensors=[text("t") + struct.pack("<I", 1 << 31)]), "2147483648 dimensions"),
        (by_hand(tensors=[tensor("t", [0], 0, 0)]), r"shape \(0,\)"),
        (by_hand(tensors=[tensor("t", [1 << 62, 1 << 62], 0, 0)]), "truncated"),
        (by_hand(tensors=[tensor("t", [4], 0, 1 << 62)]), "truncated"),
        (by_hand(tensors=[tensor("t", [4], 0, HUGE - 31)]), "truncated"),
        (by_hand(tensors=[tensor("t", [4], 0, 4)]), "not aligned to 32"),
        (by_hand(tensors=[tensor("t", [17], 0, 0)]), "truncated"),
        (by_hand(tensors=[tensor("t", [33], 8, 0)]), "blocks of 32"),
        (by_hand(tensors=[tensor("t", [128], 12, 0)]), "blocks of 256"),
        (by_hand(tensors=[tensor("t", [256], 10, 0)]), "type Q2_K; supported are F32, F16, BF16, Q8_0"),
        (by_hand(tensors=[tensor("t", [256], 20, 0)]), "type IQ4_NL"),
        (by_hand(tensors=[tensor("t", [256], 4711, 0)]), "type number 4711"),
    ],
)
def test_hostile_files(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"evil\.gguf.*(?:{reason})"):
        GgufFile(path)


def test_an_alignment_of_one_is_legal(tmp_path: Path) -> None:
    """Floats at odd addresses are copied, not viewed."""
    path = tmp_path / "odd.gguf"
    head = by_hand([text("general.alignment") + struct.pack("<II", 4, 1)], [tensor("t", [2], 0, 1)], data=0)
    head = head.rstrip(b"\0") + bytes(8)  # the offset ends in zeros, too: take them all off, then put its own back
    end = head.rindex(b"t") + 1 + struct.calcsize("<I") + 8 + 4 + 8
    path.write_bytes(head[:end] + b"\0" + struct.pack("<2f", 1.5, -2.5))
    found = read_tensor(GgufFile(path), "t")
    assert found.tolist() == [1.5, -2.5]
    assert found.data_ptr() % 4 == 0


def test_a_folder_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match="cannot be read as GGUF"):
            GgufFile(path)


def test_a_truncated_file_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(by_hand(tensors=[tensor("t", [1000], 0, 0)]))
    size = path.stat().st_size
    with pytest.raises(ModelError, match=rf"is truncated: tensor 't' needs bytes up to \d+, the file has {size}\.$"):
        GgufFile(path)
