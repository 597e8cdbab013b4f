"""A runner's token service and the store that trusts it: OIDC tokens over HTTP, SeaweedFS with its own STS.

The tokens are real (RS256 by a key that lives as long as the service), and so is what SeaweedFS makes of them: it
reads the discovery document and the keys, and its sessions end by themselves.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from appliance.demo import storage as storage_module
from appliance.demo.storage import Storage, start_storage

PAGE = Path(__file__).parent.parent / "docs" / "gitops.md"
SUBJECT = "repo:team/models:environment:training"
AUDIENCE = "sts.amazonaws.com"
ROLE = "arn:aws:iam::role/trainer"


def encode(content: bytes) -> str:
    """Base64 as in a token."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


class JsonServer(ThreadingHTTPServer):
    """Answers each GET on a port of its own with what `answer` makes of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> dict[str, Any]:
        """The object for this request."""
        raise NotImplementedError

    @contextlib.contextmanager
    def run(self) -> Iterator[Self]:
        """While active, it answers."""
        with self:
            threading.Thread(target=self.serve_forever, daemon=True).start()
            yield self
            self.shutdown()


class Issuer(JsonServer):
    """Says what it signs with, as any OIDC provider does, and mints tokens as a runner's token service does.

    `life_s` is how long a minted token is good for; `minted` has the time at which each of them ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.life_s = 3600
        self.minted: list[int] = []

    def sign(self, *, life_s: int = 3600, **claims: Any) -> str:
        """A token of the training job; keyword arguments replace claims."""
        now = int(time.time())
        facts = {"iss": self.url, "sub": SUBJECT, "aud": AUDIENCE, "iat": now, "exp": now + life_s} | claims
        parts = ({"alg": "RS256", "typ": "JWT", "kid": "one"}, facts)
        text = ".".join(encode(json.dumps(part).encode()) for part in parts)
        return f"{text}.{encode(self.key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    def answer(self, request: BaseHTTPRequestHandler) -> dict[str, Any]:
        """Discovery document, keys, or a new token."""
        url = urlsplit(request.path)
        if url.path == "/.well-known/openid-configuration":
            return {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        if url.path == "/keys":
            numbers = self.key.public_key().public_numbers()
            modulus, exponent = encode(numbers.n.to_bytes(256)), encode(numbers.e.to_bytes(3))
            return {"keys": [{"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "one", "n": modulus, "e": exponent}]}
        self.minted.append(int(time.time()) + self.life_s)
        return {"count": 1, "value": self.sign(life_s=self.life_s, aud=parse_qs(url.query)["audience"][0])}


class _Answers(BaseHTTPRequestHandler):
    server: JsonServer

    def do_GET(self) -> None:
        content = json.dumps(self.server.answer(self)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def start_sts(folder: Path, issuer: Issuer, *, session: str) -> Iterator[Storage]:
    """The embedded server, which also makes sessions of the length `session` for tokens of `issuer`."""
    folder.mkdir()
    config = folder / "iam.json"
    config.write_text(json.dumps(configure(issuer.url, session=session)))
    build = storage_module._build_command
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            option = f"-s3.iam.config={config}"
            patch.setattr(storage_module, "_build_command", lambda *a, **k: [*build(*a, **k), option])
            running = stack.enter_context(start_storage(folder / "storage", buckets=("datasets", "registry")))
        yield running


def configure(issuer: str, *, session: str) -> dict[str, Any]:
    """SeaweedFS's configuration in docs/gitops.md, for this issuer, `SUBJECT`, short sessions and our two buckets."""
    (text,) = re.findall(r"```json\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    for theirs, ours in (
        ("https://token.actions.githubusercontent.com", issuer),
        ("OWNER/NAME", "team/models"),
        ("RANDOM", base64.b64encode(secrets.token_bytes(32)).decode()),
        ('"tokenDuration": "1h"', f'"tokenDuration": "{session}"'),
        ("BUCKET/registry/", "registry/*/"),  # each test has a prefix of its own
        ("BUCKET", "*"),
        ("refs/staging.json", "refs/*"),  # the tests' recipes have the alias `production`
    ):
        assert theirs in text
        text = text.replace(theirs, ours)
    found: dict[str, Any] = json.loads(text)
    return found
