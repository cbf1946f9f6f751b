"""Weights: every file format gives the same tensors, and every broken file is an error that names it."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.errors import ModelError
from octavo.models.source import ModelSource, read_json
from octavo.models.spec import DecoderSpec, LayerSpec
from octavo.models.weights import Checkpoint, dummy, open_checkpoint

SPEC = DecoderSpec(
    family="x", vocab_size=8, embedding_rows=8, hidden=4, num_heads=2, num_kv_heads=1, head_dim=2, intermediate=8,
    max_len=16, layers=(LayerSpec(),),
)
TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.linspace(-2, 2, 10).to(torch.bfloat16),
    "c.weight": torch.linspace(-3, 3, 6).to(torch.float16).view(2, 3),
}


def open_folder(folder: Path, load_format: str = "auto") -> Checkpoint:
    return open_checkpoint(ModelSource("folder", folder, {}), SPEC, torch.float32, load_format)


def assert_same(found: Checkpoint) -> None:
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = found[name]()
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def write_shards(folder: Path, whole: str, save: Any) -> None:
    """Two files and their index."""
    stem, suffix = whole.rsplit(".", 1)
    first, second = (f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2))
    parts = {first: ["a.weight", "c.weight"], second: ["b.weight"]}
    for file, names in parts.items():
        save({name: TENSORS[name] for name in names}, folder / file)
    mapping = {name: file for file, names in parts.items() for name in names}
    (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def save_old(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """As torch wrote before 1.6: not an archive, so it cannot be mapped."""
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("file", "save"),
    [
        ("model.safetensors", save_file),
        ("other.safetensors", save_file),
        ("pytorch_model.bin", torch.save),
        ("pytorch_model.bin", save_old),
        ("weights.pt", torch.save),
        ("weights.pth", torch.save),
    ],
)
def test_one_file(file: str, save: Any, tmp_path: Path) -> None:
    save(TENSORS, tmp_path / file)
    assert_same(open_folder(tmp_path))


@pytest.mark.parametrize(("whole", "save"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_shards(whole: str, save: Any, tmp_path: Path) -> None:
    write_shards(tmp_path, whole, save)
    assert_same(open_folder(tmp_path))


def test_safetensors_come_before_pickles_unless_asked_otherwise(tmp_path: Path) -> None:
    save_file({"new": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"step": 3}, tmp_path / "optimizer.pt")
    assert list(open_folder(tmp_path)) == list(open_folder(tmp_path, "safetensors")) == ["new"]
    assert list(open_folder(tmp_path, "pt")) == ["old"]
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights.bin")
    assert list(open_folder(tmp_path, "pt")) == ["old"], "what a trainer left is no weights"


def test_tensors_are_maps_of_the_file(tmp_path: Path) -> None:
    """Opening reads no weights: the process grows by nothing near the size of the file."""
    save_file({"big": torch.zeros(1 << 24)}, tmp_path / "model.safetensors")
    before = resident()
    found = open_folder(tmp_path)
    tensor = found["big"]()
    assert resident() - before < 16 << 20
    assert tensor[-1] == 0


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "pt"])
def test_a_folder_without_weights(load_format: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "training_args.bin")
    with pytest.raises(ModelError, match=f"{tmp_path.name} holds no weights"):
        open_folder(tmp_path, load_format)


def test_formats_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"needs a \.gguf file"):
        open_folder(tmp_path, "gguf")
    with pytest.raises(ModelError, match="which is a GGUF file"):
        open_checkpoint(ModelSource("gguf", tmp_path / "m.gguf", {}), SPEC, torch.float32, "safetensors")


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    write_shards(tmp_path, "model.safetensors", save_file)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the shard model-00002-of-00002\.safetensors, which is missing"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}', "\xff"],
)
def test_an_index_that_is_no_index(index: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        open_folder(folder)


def test_two_files_with_the_same_tensor(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"both|two files of the checkpoint hold the tensor 'a\.weight'"):
        open_folder(tmp_path)


@pytest.mark.parametrize(("file", "save"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save),
                                            ("pytorch_model.bin", save_old)])
def test_truncated_anywhere(file: str, save: Any, tmp_path: Path) -> None:
    """Cut at many places: a ModelError that names the file, at opening, never another exception."""
    path = tmp_path / file
    save(TENSORS, path)
    whole = path.read_bytes()
    for end in {0, 1, 7, 8, 9, *range(10, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError, match=file):
            open_folder(tmp_path)


def test_a_safetensors_header_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for header in (
        b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
        b'{"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}',
    ):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            open_folder(tmp_path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + bytes(64))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_folder(tmp_path)


class Evil:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("gone",))


@pytest.mark.parametrize("content", [{"a": Evil()}, Evil(), [torch.zeros(1)], {"a": 3}, {3: torch.zeros(1)}])
def test_a_pickle_that_is_not_only_weights(content: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        open_folder(tmp_path)
    assert "gone" not in capfd.readouterr().out, "code of the file has run"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_types_that_need_scales_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"'a' has type {str(dtype)[6:]}"):
        open_folder(tmp_path)["a"]()


def test_a_file_that_shrinks_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match="holds no weights"):
        open_folder(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        open_folder(tmp_path)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, reason in (("[1]", "list"), ("{", "cannot be read"), ("[" * 100000, "cannot be read"), ("3", "int")):
        path.write_text(text)
        with pytest.raises(ModelError, match=rf"config\.json.*{reason}"):
            read_json(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path / "none.json")


# Dummy weights


def test_dummy_weights_are_the_same_ones_in_every_run() -> None:
    expected = {"embed.weight": (1000, 64), "layers.0.attn.q.weight": (64, 64), "layers.0.attn_norm.weight": (64,),
                "layers.0.attn.q.bias": (64,)}
    first = dict(dummy(expected, SPEC, torch.bfloat16))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == expected
    for name, tensor in dummy(expected, SPEC, torch.bfloat16):
        assert torch.equal(first[name], tensor)
    matrix = first["embed.weight"].float()
    assert abs(float(matrix.std()) - 0.02) < 0.001
    assert abs(float(matrix.mean())) < 0.001
    assert first["layers.0.attn_norm.weight"].tolist() == [1.0] * 64
    assert first["layers.0.attn.q.bias"].tolist() == [0.0] * 64


def test_dummy_norms_are_the_identity_where_weights_mean_one_plus_w() -> None:
    found = dict(dummy({"final_norm.weight": (4,)}, replace(SPEC, norm_offset=1.0), torch.float32))
    assert found["final_norm.weight"].tolist() == [0.0] * 4


def test_big_dummy_matrices_differ_from_each_other() -> None:
    found = dict(dummy({f"m{i}.weight": (1500, 1000) for i in range(3)}, SPEC, torch.float32))
    assert not torch.equal(found["m0.weight"], found["m1.weight"])
    assert not torch.equal(found["m1.weight"], found["m2.weight"])
    rows = found["m1.weight"]
    assert len({tuple(row[:4].tolist()) for row in rows}) > 1400, "rows repeat"


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", ["meta", "sparse", "sparse csr"])
def test_a_tensor_without_plain_values_is_named(kind: str, tmp_path: Path) -> None:
    tensor = torch.eye(4)
    made = {"meta": lambda: tensor.to("meta"), "sparse": tensor.to_sparse, "sparse csr": tensor.to_sparse_csr}[kind]()
    torch.save({"good": torch.ones(2), "bad.weight": made}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: tensor 'bad\.weight' is .*(meta|sparse)"):
        open_checkpoint(ModelSource("folder", tmp_path, {}), SPEC, torch.float32)
