"""A Cloud Storage server on this machine: buckets in memory, and a part of the JSON API.

Three libraries connect to it. Google's client and TensorStore have settings for the address.
TensorFlow has none: the server is its proxy as well, with a certificate that TensorFlow trusts.
"""

import datetime
import json
import re
import ssl
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOSTS = ("www.googleapis.com", "storage.googleapis.com")


@dataclass
class Storage:
    """The objects of the server, its requests, and requests to be denied."""

    buckets: dict[str, dict[str, bytes]]  # contents of objects by bucket and name
    environment: dict[str, str] = field(default_factory=dict)
    denied: str | None = None  # of requests "METHOD /path?query" that match, the status is 403
    requests: list[str] = field(default_factory=list)  # answered: "METHOD /path?query STATUS"
    generations: dict[tuple[str, str], int] = field(default_factory=dict)
    uploads: dict[str, tuple[str, str]] = field(default_factory=dict)
    count: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def put(self, bucket: str, name: str, content: bytes) -> None:
        with self.lock:
            self.count += 1
            self.buckets[bucket][name] = content
            self.generations[bucket, name] = self.count

    def resource(self, bucket: str, name: str) -> dict[str, str]:
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.buckets[bucket][name])),
            "generation": str(self.generations[bucket, name]),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
        }


@contextmanager
def serve(folder: Path, *buckets: str):
    """Yields the storage of a server with these empty buckets.

    Processes with its `environment` use the server. The certificate and its key are in `folder`.
    """
    storage = Storage({name: {} for name in buckets})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.storage, server.tls = storage, _tls(folder)  # pyright: ignore
    address = f"http://127.0.0.1:{server.server_port}"
    storage.environment = {
        "STORAGE_EMULATOR_HOST": address,
        "GOOGLE_CLOUD_PROJECT": "tests",
        "TENSORSTORE_GCS_HTTP_URL": address,
        "https_proxy": address,
        "no_proxy": "127.0.0.1,localhost",
        "CURL_CA_BUNDLE": str(folder / "authority.pem"),
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "NO_GCE_CHECK": "true",  # no request for a token
        "GCS_RETRY_CONFIG_MAX_RETRIES": "2",
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield storage
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def storage(self) -> Storage:
        return self.server.storage  # pyright: ignore

    def log_message(self, *args) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.send_response_only(200)
        self.end_headers()
        if self.path.partition(":")[0] not in HOSTS:
            self.close_connection = True
            return
        tls = self.server.tls.wrap_socket(self.connection, server_side=True)  # pyright: ignore
        self.connection = tls
        self.rfile, self.wfile = tls.makefile("rb"), tls.makefile("wb", 0)
        self.close_connection = False

    def _answer(self) -> None:
        body = self._body()
        request = f"{self.command} {self.path}"
        with self.storage.lock:
            denied = self.storage.denied and re.search(self.storage.denied, request)
            status, content, headers = (403, _error(403), {}) if denied else self._route(body)
            self.storage.requests.append(f"{request} {status}")
        if isinstance(content, dict):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | headers
        if status not in (204, 304):
            headers = headers | {"Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _answer

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self, body: bytes):
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        path, storage = url.path, self.storage
        if "upload_id" in query:
            bucket, name = storage.uploads[query["upload_id"]]
            # A query for the bytes received; for an empty file it ends the upload.
            if re.fullmatch(r"bytes \*/[1-9]\d*", self.headers.get("Content-Range", "")):
                return 308, b"", {}
            storage.put(bucket, name, body)
            return 200, storage.resource(bucket, name), {}
        plain = re.fullmatch(
            r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/(o|storageLayout)(?:/(.*))?)?", path
        )
        if not plain:  # the XML API
            bucket, _, name = path[1:].partition("/")
            query["alt"], listing = "media", None
        else:
            bucket, listing, name = plain.groups()
        bucket = unquote(bucket)
        if bucket not in storage.buckets:
            return 404, _error(404, "The specified bucket does not exist."), {}
        if name is None:
            if listing != "o":  # the bucket itself
                about = {"name": bucket, "id": bucket, "location": "US", "metageneration": "1"}
                return 200, about | {"bucket": bucket, "hierarchicalNamespace": {}}, {}
            if self.command == "POST":
                return self._upload(bucket, query, body)
            return self._list(bucket, query)
        if "/rewriteTo/" in name:
            source, _, target = name.partition("/rewriteTo/")
            other, _, target = target.removeprefix("b/").partition("/o/")
            source, target, other = unquote(source), unquote(target), unquote(other)
            if source not in storage.buckets[bucket]:
                return 404, _error(404), {}
            storage.put(other, target, storage.buckets[bucket][source])
            return 200, {"done": True, "resource": storage.resource(other, target)}, {}
        return self._object(bucket, unquote(name), query)

    def _object(self, bucket: str, name: str, query: dict[str, str]):
        storage = self.storage
        objects = storage.buckets[bucket]
        if name not in objects:
            return 404, _error(404, f"No such object: {bucket}/{name}"), {}
        generation = str(storage.generations[bucket, name])
        if query.get("ifGenerationMatch", generation) != generation:
            return 412, _error(412), {}
        if query.get("ifGenerationNotMatch") == generation:
            return 304, b"", {}
        if self.command == "DELETE":
            del objects[name]
            return 204, b"", {}
        if query.get("alt") != "media":
            return 200, storage.resource(bucket, name), {}
        content = objects[name]
        headers = {"x-goog-generation": generation, "Content-Type": "application/octet-stream"}
        ranged = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not ranged:
            return 200, content, headers
        first, last = ranged.groups()
        if first == "":
            start, end = max(len(content) - int(last), 0), len(content)
        else:
            start, end = int(first), min(int(last or len(content)) + 1, len(content))
        if start >= len(content):
            return 416, b"", headers
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        return 206, content[start:end], headers

    def _upload(self, bucket: str, query: dict[str, str], body: bytes):
        storage = self.storage
        name = query["name"]
        there = name in storage.buckets[bucket]
        existing = str(storage.generations[bucket, name]) if there else "0"
        if query.get("ifGenerationMatch", existing) != existing:
            return 412, _error(412), {}
        if query["uploadType"] == "resumable":
            number = str(len(storage.uploads))
            storage.uploads[number] = bucket, name
            location = f"https://{HOSTS[0]}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
            return 200, b"", {"Location": location}
        storage.put(bucket, name, body)
        return 200, storage.resource(bucket, name), {}

    def _list(self, bucket: str, query: dict[str, str]):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        by_name = {}  # resources and prefixes by their names
        for name in self.storage.names(bucket, prefix):
            if name < first or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest.partition(delimiter)[0] + delimiter
                by_name[folder] = folder
            else:
                by_name[name] = self.storage.resource(bucket, name)
        entries = [by_name[name] for name in sorted(by_name)]
        # Small pages, so that clients request several.
        start = int(query.get("pageToken") or 0)
        size = min(int(query.get("maxResults") or 50), 50)
        page = entries[start : start + size]
        listing = {
            "kind": "storage#objects",
            "items": [entry for entry in page if isinstance(entry, dict)],
            "prefixes": [entry for entry in page if isinstance(entry, str)],
        }
        if start + size < len(entries):
            listing["nextPageToken"] = str(start + size)
        return 200, listing, {}


def _error(status: int, message: str = "refused"):
    return {"error": {"code": status, "message": message, "errors": [{"message": message}]}}


def _tls(folder: Path) -> ssl.SSLContext:
    """Returns a TLS context with a certificate for Google's hosts, signed by its own key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a bucket of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(h) for h in HOSTS]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "authority.pem", folder / "key.pem"
    public.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context
