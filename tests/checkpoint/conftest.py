"""A tiny random model, and a local server that stands in for a model hub."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session

COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".gguf")
"""Files that a hub keeps in large file storage."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 blocks (about 10 MB) in several safetensors files. Not to be changed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="6MB")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_model` to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 blocks in one GGUF file, partly quantized (Q8_0), with a small BPE vocabulary."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    width, inner, heads = 64, 128, 4
    tokens = ["<|end|>", *bytes_to_unicode().values(), "he", "ll"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        data = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, data)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), width)
    add("output_norm.weight", width)
    for block in range(2):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{name}.weight", width)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}.weight", width, width)
        for name, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            add(f"blk.{block}.ffn_{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in mid-answer is what some tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """Serves folders as a model hub does: listing, redirects, byte ranges. Counts bytes."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.sent = 0
        """Bytes of files that were sent."""
        self.requests: list[str] = []
        self.authorization: dict[str, str | None] = {}
        self.ignore_ranges = False
        self.cut_after: list[int] = []
        """For each of the next large answers, after how many bytes to drop the connection."""
        self.statuses: list[int] = []
        """Answers to give to the next requests for files, in place of the file."""
        self.missing_bytes = 0
        """By how many bytes the large files here are shorter than their listing says."""
        self.guard = Lock()
        self.stopped = False
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Vanish from the network, open connections included."""
        self.stopped = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def listing(self, model: str) -> dict[str, Any]:
        siblings = []
        for path in sorted(path for path in self.models[model].rglob("*") if path.is_file()):
            content = path.read_bytes()
            name = path.relative_to(self.models[model]).as_posix()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.suffix in LARGE:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": model, "sha": COMMIT, "siblings": siblings}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            if hub.stopped:
                self.close_connection = True
                return
            path = unquote(urlsplit(self.path).path)
            with hub.guard:
                hub.requests.append(path)
                hub.authorization[path] = self.headers.get("Authorization")
            if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
                self.answer_listing(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
                self.answer_file(match[1], match[3], redirect=match[3].endswith(LARGE))
            elif match := re.fullmatch(r"/cdn/(.+?)/-/(.+)", path):
                self.answer_file(match[1], match[2], redirect=False)
            else:
                self.reply(404, b"")

        def answer_listing(self, model: str, revision: str) -> None:
            if model not in hub.models:
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                self.reply(200, json.dumps(hub.listing(model)).encode())

        def answer_file(self, model: str, file: str, *, redirect: bool) -> None:
            if redirect:
                self.reply(302, b"", {"Location": f"/cdn/{model}/-/{file}"})
                return
            large = file.endswith(LARGE)
            with hub.guard:
                status = hub.statuses.pop(0) if hub.statuses and large else None
                cut = hub.cut_after.pop(0) if hub.cut_after and large else None
            if status is not None:
                self.reply(status, b"")
                return
            content = (hub.models[model] / file).read_bytes()
            if large and hub.missing_bytes:
                content = content[: -hub.missing_bytes]
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not match or hub.ignore_ranges:
                self.reply(200, content, cut=cut)
                return
            start, end = int(match[1]), min(int(match[2]) + 1, len(content))
            if start >= len(content):
                self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            stated = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            self.reply(206, content[start:end], stated, cut=cut)

        def reply(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if cut is not None:
                body, self.close_connection = body[:cut], True
            try:
                for at in range(0, len(body), 65536):
                    self.wfile.write(body[at : at + 65536])
                    if status in (200, 206) and "/api/" not in self.path:
                        with hub.guard:
                            hub.sent += len(body[at : at + 65536])
            except OSError:  # the client had enough
                self.close_connection = True

    return Handler


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    """A hub with the model ``someone/tiny``."""
    server = Hub()
    server.models["someone/tiny"] = tiny_model
    yield server
    server.stop()
    close_session()
