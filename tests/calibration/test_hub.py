"""A calibrated router goes to a hub and comes back."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model

from moekv.calibration.router import CalibratedRouter
from moekv.models.fingerprint import fingerprint, short

REPO, COMMIT = "someone/router", "1" * 40

PROGRAM = """
import sys
import moekv.calibration.router
from moekv import MoERouterPress

source, target, repo = sys.argv[1:]
router = moekv.calibration.router.CalibratedRouter.from_pretrained(source)
print(router.push_to_hub(repo))
press = MoERouterPress(0.5, router=repo)
assert press.router == repo  # a constructor asks no hub
loaded = moekv.calibration.router.load_router(repo)
assert loaded.recipe == router.recipe
loaded.save_pretrained(target)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as pushing and loading small files takes."""

    files: dict[str, bytes]
    requests: list[str]

    def answer(self, body: bytes | dict[str, object], **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        self.requests.append(f"POST {self.path}")
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/{REPO}"})
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(content)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": f["path"]} | regular for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/{REPO}/commit/{COMMIT}"
            self.answer({"commitUrl": url, "commitOid": COMMIT})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        start = f"/{REPO}/resolve/main/"
        name = self.path.removeprefix(start)
        if not self.path.startswith(start) or name not in self.files:
            self.send_error(404)
            return
        content = self.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    handler = type("OwnHub", (Hub,), {"files": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def make_router() -> CalibratedRouter:
    curve = [{"epoch": float(i), "ranking_loss": loss} for i, loss in enumerate((0.3, 0.1))]
    router = CalibratedRouter(
        model=fingerprint(tiny_model()),
        layers=[0, 1],
        hidden_size=32,
        num_kv_heads=2,
        experts=["expected"],
        top_k=2,
        recipe={
            "model_name": "tiny/model",
            "num_texts": 7,
            "texts_sha256": "0123456789abcdef",
            "curve": curve,
        },
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return router


def test_a_router_is_pushed_to_a_hub_and_loaded_by_its_id(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    router = make_router()
    router.save_pretrained(tmp_path / "source")
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_of_nobody",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    folders = [str(tmp_path / name) for name in ("source", "target")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders, REPO],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    files = hub.RequestHandlerClass.files  # type: ignore[attr-defined]
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (tmp_path / "source" / name).read_bytes()
        assert files[name] == (tmp_path / "target" / name).read_bytes()
        asked = hub.RequestHandlerClass.requests  # type: ignore[attr-defined]
        assert f"GET /{REPO}/resolve/main/{name}" in asked
    loaded = load_file(tmp_path / "target" / "model.safetensors")
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in router.state_dict().items())

    card = files["README.md"].decode()
    assert "library_name: moekv" in card
    assert f'router="{REPO}"' in card
    assert "# A router of moekv for tiny/model\n" in card


def test_the_model_card_says_what_the_router_is(tmp_path: Path) -> None:
    router = make_router()
    router.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"- fingerprint: `{short(router.model)}`\n" in card
    assert "- layers: 2, with hidden states of 32 and 2 KV heads\n" in card
    assert "- experts: learned, expected, of which each token is routed to 2\n" in card
    assert "- texts: 7, SHA-256 0123456789abcdef...\n" in card
    assert "- ranking loss on held-out texts: 0.3000 with even gates, 0.1000 as trained\n" in card
    assert "[More Information Needed]" not in card

    bare = CalibratedRouter(
        model="abc", layers=[0], hidden_size=8, num_kv_heads=1, experts=[], top_k=1
    )
    text = str(bare.generate_model_card())
    assert "# A router of moekv for abc\n" in text and "- texts" not in text
