"""Who may import whom (docs: architecture), held by reading every module's imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each folder may import besides itself.
ARROWS: dict[str, set[str]] = {
    "protos": set(),
    "engine": {"protos"},
    "kvtransfer": {"protos"},
    "router": {"protos"},
    "prefill_worker": {"engine", "kvtransfer", "protos"},
    "decode_worker": {"engine", "kvtransfer", "protos"},
    "simulator": {"router", "prefill_worker", "decode_worker", "engine", "kvtransfer", "protos"},
    "cluster": {"router", "prefill_worker", "decode_worker", "engine", "kvtransfer", "protos", "bench", "simulator"},
    "bench": {"router", "prefill_worker", "decode_worker", "engine", "kvtransfer", "protos", "cluster", "simulator"},
}

# A module is pure unless it is named here. Shells do input and output, keep time, or hold tensors; a pure module gets
# all of that as values, so that the simulator can run it under a clock of its own.
SHELLS: dict[str, str] = {
    "protos": "codec",
    "engine": """attention decode_buffers decode_graphs determinism_check deterministic_runner device_memory
        device_runner device_steps engine_thread fixed_attention fused_modules half_weights host_copies host_memory
        local_engine logits model_facts model_loader model_runner packed_linear paged_kv_cache request_owners
        router_session runners sampler step_inputs transfer_port triton_attention triton_layers worker worker_health
        worker_host""",
    "kvtransfer": """agent asks block_store cuda_ipc_link destination_lane destination_side gloo_link greeter
        lane_thread life_mark link_store local_socket memory_link nccl_link outgoing_peer peer_channel polled_link
        segment shared_memory_link source_lane source_side staging transport transports""",
    "router": """call_writer calls client_call cluster_service driver front_door grpc_call http_app http_requests
        http_server link_metrics membership metrics openai.api orders prompts pull_metrics reply
        responses server tls worker_channel worker_metrics""",
    "prefill_worker": "actor",
    "decode_worker": "actor",
    "simulator": "command runs",
    "bench": "load.client load.command load.probe load.runner",
    "cluster": """actors aio_client cli client client_messages demo fit ray_call ray_cluster ray_node router_handle
        routers scrape serve show supervisor wait_for""",
}
SHELL_MODULES = {f"{folder}.{name}" for folder, names in SHELLS.items() for name in names.split()}


def is_never_pure(name: str) -> bool:
    """Benchmarks measure: all of them are shells. The load generator is a program with a core of its own."""
    return name.startswith("bench.") and not name.startswith("bench.load.")


# Time and randomness are handed in to pure modules; text models and tensors are not theirs.
IMPURE = {
    *(
        "asyncio",
        "concurrent",
        "multiprocessing",
        "queue",
        "random",
        "secrets",
        "socket",
        "ssl",
        "subprocess",
        "threading",
        "time",
    ),
    *(
        "grpc",
        "grpc_health",
        "grpc_reflection",
        "prometheus_client",
        "ray",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    ),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_stub(name: str) -> bool:
    return name.endswith(("_pb2", "_pb2_grpc"))


def modules() -> dict[str, Path]:
    """Every module of ours by its name, stubs and package files left out."""
    paths = (path for folder in ARROWS for path in (ROOT / folder).rglob("*.py"))
    return {module_name(path): path for path in paths if path.name != "__init__.py" and not is_stub(path.stem)}


MODULES = modules()
PURE_MODULES = sorted(name for name in MODULES if name not in SHELL_MODULES and not is_never_pure(name))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, but nothing under `if TYPE_CHECKING:`, which never runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from runtime_nodes(child)


def imports_of(name: str) -> set[str]:
    """Dotted names that a module imports, wherever it does so. `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import; a path is its import name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def our_module(imported: str) -> str | None:
    """The module of ours that a dotted name lies in."""
    while imported and imported not in MODULES:
        imported = imported.rpartition(".")[0]
    return imported or None


def impurities_of(name: str) -> set[str]:
    """Imports that make a module a shell: impure libraries, stubs, and other shells."""
    return {
        imported
        for imported in imports_of(name)
        if imported.partition(".")[0] in IMPURE
        or any(is_stub(part) for part in imported.split("."))
        or our_module(imported) in SHELL_MODULES
    }


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_down(name: str) -> None:
    folder = name.partition(".")[0]
    ours = {imported.partition(".")[0] for imported in imports_of(name)} & {*ARROWS, "tests"}
    forbidden = ours - ARROWS[folder] - {folder}
    assert not forbidden, f"{name} imports {forbidden}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES.keys() - SHELL_MODULES if not is_never_pure(name)))
def test_pure_modules_are_pure(name: str) -> None:
    impurities = impurities_of(name)
    assert not impurities, f"{name} imports {sorted(impurities)}; pure modules decide, shells (SHELLS) act"


@pytest.mark.parametrize("name", sorted(SHELL_MODULES))
def test_shells_are_shells(name: str) -> None:
    assert name in MODULES, f"no module {name}: strike it from SHELLS"
    assert impurities_of(name), f"{name} is pure: strike it from SHELLS"


def test_package_files_are_empty() -> None:
    package_files = [path for folder in ARROWS for path in (ROOT / folder).rglob("__init__.py")]
    assert package_files
    assert not [str(path) for path in package_files if path.read_bytes()]


def test_every_folder_has_its_arrows() -> None:
    folders = {path.parent.name for path in ROOT.glob("[a-z]*/__init__.py")} - {"tests"}
    assert folders <= ARROWS.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_loggers_are_named_for_their_folder(name: str) -> None:
    allowed = {"twinring", f"twinring.{name.partition('.')[0]}"}  # cluster sets up the root of them
    if name == "cluster.logs":
        allowed.add("uvicorn")  # whose lines join ours
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
            argument = node.args[0] if node.args else None
            assert isinstance(argument, ast.Constant), f"{name}:{node.lineno} names its logger by {argument}"
            assert argument.value in allowed, f"{name}:{node.lineno} logs as {argument.value!r}"
