"""The rooms of docs/architecture.md, held against the imports that the code really has."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support.sources import parse

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "octavo"

# Each room with all that it may import, besides itself.
BASE = {"types", "errors", "env", "log"}
DECIDE = {"kvcache", "sched"}
DEVICE = {"platforms", "kernels", "attention", "weights", "layers", "models", "quant", "runner"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "env": {"errors"},
    "log": {"env"},
    "config": BASE,
    "checkpoint": BASE | {"config"},
    "kvcache": BASE,
    "sched": BASE | {"config", "kvcache"},
    "platforms": BASE | {"config", "kernels.cpu.library"},  # what this machine can run
    "kernels": BASE | {"platforms"},
    "attention": BASE | {"config", "platforms", "kernels"},
    "weights": BASE | {"config", "checkpoint"},
    "layers": BASE | {"config", "platforms", "kernels", "attention", "weights"},
    "models": BASE | {"config", "kernels", "attention", "weights", "layers"},
    "quant": BASE | {"config", "kernels", "attention", "weights", "layers", "models"},
    "runner": BASE | {"config", "checkpoint", "sched.plan"} | (DEVICE - {"runner"}),
    "text": BASE | {"config", "checkpoint"},
    "engine": BASE | {"config", "checkpoint", "text", ""} | DECIDE | DEVICE,
    # The torch-free face of the engine is all that the server may see.
    "server": BASE
    | {"config", "checkpoint", "text", "engine.client", "engine.supervisor", "engine.protocol", ""},
    "llm": BASE | {"config", "checkpoint", "text", "engine.core", "engine.build"},
    "bench": BASE
    | {"config", "checkpoint", "platforms", "text", "llm", "engine.core", "engine.build"},
    "cli": BASE
    | {"config", "checkpoint", "text", "llm", "server", "bench", "platforms", "sched.plan", ""}
    | {"engine.client", "engine.build", "engine.recording", "engine.replay"},
    "__init__": {"env", "types", "llm"},
    "__main__": {"cli"},
}
TORCH_FREE = [
    "types",
    "config",
    "checkpoint",
    "kvcache",
    "sched",
    "text",
    "server",
    "engine.client",
    "engine.supervisor",
]


def room_of(module: str) -> str:
    """The part after the first dot: `sched` of octavo.sched.plan."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports_of(source: str) -> set[str]:
    """Every octavo module that the source imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            # `from octavo import env` names a room, `from octavo.types import X` a value.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "octavo" else {node.module or ""}
    return {name for name in found if name == "octavo" or name.startswith("octavo.")}


def is_allowed(target: str, rooms: set[str]) -> bool:
    """Whether a module ("sched.plan") is one of the rooms, or lies in one."""
    return any(target == room or (room and target.startswith(f"{room}.")) for room in rooms)


def violations(path: Path, source: str) -> list[str]:
    room = room_of(module_of(path))
    targets = sorted(name.removeprefix("octavo").removeprefix(".") for name in imports_of(source))
    return [
        f"{path.relative_to(ROOT)} imports octavo.{target}"
        for target in targets
        if not target.startswith("__") and not is_allowed(target, ALLOWED[room] | {room})
    ]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_no_import_goes_up_or_sideways() -> None:
    bad = [line for path in FILES for line in violations(path, path.read_text())]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("sched/scheduler.py", "from octavo.runner.runner import ModelRunner"),
        ("kvcache/cache.py", "from octavo.sched.request import Request"),
        ("models/llama.py", "import octavo.engine.core"),
        ("runner/runner.py", "from octavo.sched.scheduler import Scheduler"),
        ("server/app.py", "from octavo.engine.core import EngineCore"),
        ("text/stop.py", "if TYPE_CHECKING:\n    from octavo.llm import LLM"),
        ("config/resolve.py", "from octavo import platforms"),
    ],
)
def test_a_planted_upward_import_is_found(file: str, line: str) -> None:
    path = PACKAGE / file
    assert violations(path, path.read_text() + "\n" + line)


def test_every_file_has_a_room() -> None:
    assert {room_of(module_of(path)) for path in FILES} - {""} <= set(ALLOWED)


def test_the_server_side_never_loads_torch() -> None:
    code = (
        "import sys, importlib\n"
        "for room in sys.argv[1:]:\n"
        "    importlib.import_module('octavo.' + room)\n"
        "    assert 'torch' not in sys.modules, room\n"
    )
    command = [sys.executable, "-c", code, *TORCH_FREE, "cli.main", "cli.serve"]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("module", [*TORCH_FREE, "cli.main", "cli.serve"])
def test_each_of_its_rooms_can_be_imported_first(module: str) -> None:
    assert (
        subprocess.run([sys.executable, "-c", f"import octavo.{module}"], check=False).returncode
        == 0
    )


def test_the_offline_engine_needs_none_of_the_servers_packages() -> None:
    missing = (
        "msgspec",
        "gguf",
        "starlette",
        "fastapi",
        "uvicorn",
        "prometheus_client",
        "matplotlib",
    )
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import octavo.llm"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_octavo_is_quick_and_light() -> None:
    code = "import sys, octavo; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_env_reads_the_environment() -> None:
    for path in FILES:
        if path.name != "env.py":
            assert "os.environ" not in path.read_text(), (
                f"{path}: put the variable in octavo/env.py"
            )
