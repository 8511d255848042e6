"""TLS on both fronts, with certificates of an authority that only this test knows."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from cluster.aio_client import AsyncClient
from cluster.client import Client
from cluster.client_types import Access, CallFailed, RetryPolicy, Sampling
from router.config import RouterConfig
from router.server import RouterServer
from router.tls import read_key_and_chain
from tests.router.conftest import SERVED, with_fields
from tests.router.test_access import TOKENS, headers, with_tenants

AT_ONCE = RetryPolicy(give_up_after_s=0)
FOUR = Sampling(max_tokens=4)


@dataclass(frozen=True)
class Files:
    ca: str
    other_ca: str
    cert: str
    key: str

    def settings(self) -> dict[str, str]:
        return {"tls_cert": self.cert, "tls_key": self.key}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    ca, other_ca = trustme.CA(), trustme.CA()
    server = ca.issue_cert("127.0.0.1", "localhost")
    made = Files(*(str(folder / name) for name in ("ca.pem", "other_ca.pem", "cert.pem", "key.pem")))
    ca.cert_pem.write_to_path(made.ca)
    other_ca.cert_pem.write_to_path(made.other_ca)
    for blob in server.cert_chain_pems:
        blob.write_to_path(made.cert, append=True)
    server.private_key_pem.write_to_path(made.key)
    return made


async def start(launch: Any, files: Files) -> Any:
    return await launch("p-0", "d-0", config=with_fields(tenants=with_tenants().tenants, **files.settings()))


async def ask(port: int, access: Access, host: str = "127.0.0.1") -> str:
    """Both clients; the text that they got."""

    def in_a_thread() -> str:
        with Client(f"{host}:{port}", AT_ONCE, access) as client:
            return client.generate("abcd", FOUR, timeout_s=10).text

    text = await asyncio.to_thread(in_a_thread)
    async with AsyncClient(f"{host}:{port}", AT_ONCE, access) as client:
        assert (await client.generate("abcd", FOUR, timeout_s=10)).text == text
    return text


async def test_grpc_over_tls_with_a_token(launch: Any, files: Files) -> None:
    service = await start(launch, files)
    for host in ("127.0.0.1", "localhost"):
        assert await ask(service.port, Access(TOKENS["ann"], files.ca), host) == "abcd"
    for token in (None, "token-of-nobody"):
        with pytest.raises(CallFailed, match="UNAUTHENTICATED"):
            await ask(service.port, Access(token, files.ca))


@pytest.mark.parametrize("kind", ["plain text", "another authority", "what the machine trusts"])
async def test_grpc_needs_the_right_authority(launch: Any, files: Files, kind: str) -> None:
    service = await start(launch, files)
    access = {
        "plain text": Access(TOKENS["ann"]),
        "another authority": Access(TOKENS["ann"], files.other_ca),
        "what the machine trusts": Access(TOKENS["ann"], tls=True),
    }[kind]
    with pytest.raises(CallFailed, match="UNAVAILABLE"):
        await ask(service.port, access)
    assert not service.workers["p-0"].submits


async def test_https(launch: Any, files: Files) -> None:
    service = await start(launch, files)
    port = service.server.http_port

    async def models(url: str, ca: str) -> httpx.Response:
        trusted = ssl.create_default_context(cafile=ca)
        async with httpx.AsyncClient(verify=trusted, timeout=10, headers=headers(TOKENS["ann"])) as client:
            return await client.get(f"{url}:{port}/v1/models")

    for host in ("127.0.0.1", "localhost"):
        assert (await models(f"https://{host}", files.ca)).json()["data"][0]["id"] == "echo"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await models("https://127.0.0.1", files.other_ca)
    with pytest.raises(httpx.TransportError):
        await models("http://127.0.0.1", files.ca)


# --- files that are not fit ---------------------------------------------------------------------------------------


def config_of(files: Files, **changes: str) -> RouterConfig:
    return with_fields(**(files.settings() | changes))


def test_without_tls_nothing_is_read() -> None:
    assert read_key_and_chain(RouterConfig()) is None


def test_the_key_and_the_chain(files: Files) -> None:
    pair = (Path(files.key).read_bytes(), Path(files.cert).read_bytes())
    assert read_key_and_chain(config_of(files)) == pair
    assert b"PRIVATE KEY" in pair[0]


@pytest.mark.parametrize("name", ["tls_cert", "tls_key"])
def test_one_without_the_other_is_refused(name: str, files: Files) -> None:
    with pytest.raises(ValueError, match="tls_cert and tls_key go together"):
        with_fields(**{name: files.settings()[name]})


@pytest.mark.parametrize("name", ["tls_cert", "tls_key"])
def test_a_missing_file_is_named(name: str, files: Files) -> None:
    with pytest.raises(OSError, match=f"{name} /no/such/file: No such file or directory"):
        read_key_and_chain(config_of(files, **{name: "/no/such/file"}))


def test_files_that_are_no_pair_are_refused(files: Files, tmp_path: Path) -> None:
    junk, other, locked = tmp_path / "junk", tmp_path / "other", tmp_path / "locked"
    junk.write_text("junk")
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(str(other))
    locked.write_bytes(locked_key(Path(files.key).read_bytes()))
    for path in (junk, other, locked, files.ca):
        with pytest.raises(OSError, match="expected a certificate chain and its unencrypted key") as caught:
            read_key_and_chain(config_of(files, tls_key=str(path)))
        assert str(path) in str(caught.value)
    with pytest.raises(OSError, match="expected a certificate chain"):
        read_key_and_chain(config_of(files, tls_cert=str(junk)))


def locked_key(key: bytes) -> bytes:
    """The same, behind a password."""
    return serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


async def test_a_server_with_a_missing_key_does_not_start(files: Files) -> None:
    server = RouterServer(config_of(files, tls_key="/no/such/file"), SERVED)
    with pytest.raises(OSError, match="tls_key /no/such/file"):
        await server.start()
    assert server.http_port is None
    await server.stop(0)


@pytest.mark.parametrize("token", ["two\nlines", "trailing\n", "t\u00f6ken"])
def test_a_token_that_no_header_may_have_is_not_quoted(token: str) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(ValueError, match="the token has a line end") as caught:
            make("127.0.0.1:1", access=Access(token))
        assert token not in str(caught.value)
    assert token not in repr(Access(token))
