"""The house stays as planned: who may import whom, and what stays free of torch."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.cli import verb_names

ROOT = Path(__file__).resolve().parents[1]

# Each layer imports only from itself and from those before it.
LAYERS = [
    {"sft_dist", "sft_dist.errors", "sft_dist.faults", "sft_dist.redaction", "sft_dist.paths", "sft_dist.runfile",
     "sft_dist.config", "sft_dist.signals"},
    {"sft_dist.data"},
    {"sft_dist.distributed"},
    {"sft_dist.model"},
    {"sft_dist.session"},
    {"sft_dist.train"},
    {"sft_dist.preparation", "sft_dist.inspection", "sft_dist.training", "sft_dist.score", "sft_dist.export",
     "sft_dist.generation", "sft_dist.verify", "sft_dist.estimate", "sft_dist.checking", "sft_dist.evaluation",
     "sft_dist.adapter_export", "sft_dist.prediction"},
    {"sft_dist.cli"},
    {"sft_dist.__main__"},
]  # fmt: skip
KNOWS_DEEPSPEED = {"sft_dist/model/engine.py", "sft_dist/model/zero.py"}
KNOWS_COLLECTIVES = {f"sft_dist/distributed/{name}.py" for name in ("world", "collectives", "watchdog")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int | None:
    for number, names in enumerate(LAYERS):
        for name in names:
            if module == name or (name != "sft_dist" and module.startswith(name + ".")):
                return number
    return None


def sources() -> list[Path]:
    return sorted((ROOT / "sft_dist").rglob("*.py"))


def test_each_layer_imports_only_from_those_before_it() -> None:
    wrong = []
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        own = layer_of(module)
        assert own is not None, f"{module} has no layer"
        for name in imports(path):
            other = layer_of(name)
            if name.startswith("sft_dist") and other is not None and other > own:
                wrong.append(f"{module} imports {name}")
    assert not wrong


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("deepspeed", KNOWS_DEEPSPEED),
        ("torch.distributed", KNOWS_COLLECTIVES | {"sft_dist/model/zero.py"}),
        ("mpi4py", {"sft_dist/distributed/world.py"}),
        ("launcher", {"sft_dist/cli.py"}),
    ],
)
def test_a_package_is_known_to_few_modules(package: str, allowed: set[str]) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }
    assert users <= allowed


def test_data_layer_never_imports_torch_itself() -> None:
    users = [path for path in (ROOT / "sft_dist" / "data").glob("*.py") if "torch" in imports(path)]
    assert not users


@pytest.mark.parametrize(
    "modules",
    [
        "sft_dist.config, sft_dist.errors, sft_dist.cli",
        "sft_dist.data.conversation, sft_dist.data.formats, sft_dist.data.renderer, sft_dist.data.rendering, "
        "sft_dist.data.store, sft_dist.data.prepare, sft_dist.data.packing, sft_dist.data.plan, sft_dist.data.sample",
        "launcher.__main__",
        "sft_dist.preparation, sft_dist.inspection, sft_dist.training, sft_dist.estimate, sft_dist.verify",
    ],
)
def test_importing_loads_no_torch(modules: str) -> None:
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# What the help of a verb may import beyond the standard library: the command line itself.
HELP_NEEDS = {
    "sft_dist",
    "sft_dist.cli",
    "sft_dist.errors",
    "sft_dist.redaction",
    "sft_dist.signals",
    "sft_dist.__main__",
}
# An interpreter with argparse, and room for what a newer Python adds; numpy alone would be 150 more.
MOST_MODULES = 200


@pytest.mark.parametrize("verb", [None, *verb_names()])
def test_the_help_of_a_verb_imports_the_command_line_and_nothing_else(verb: str | None) -> None:
    """Counted, since a time depends on the machine: benchmarks/startup.py has those."""
    code = (
        "import atexit, json, os, sys\n"
        "from sft_dist import cli\n"
        "leave = os._exit\n"
        "def told(code):\n"
        "    sys.stderr.write(json.dumps(sorted(sys.modules)))\n"
        "    sys.stderr.flush()\n"
        "    leave(code)\n"
        "atexit.register(told, 0)\n"  # argparse leaves by SystemExit after a help
        "cli.main(sys.argv[1:])\n"
    )
    arguments = [verb, "--help"] if verb else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: sft-dist")
    modules = json.loads(done.stderr)
    ours = {name for name in modules if name.split(".")[0] in ("sft_dist", "launcher")}
    assert ours <= HELP_NEEDS
    heavy = {"torch", "transformers", "deepspeed", "numpy", "pyarrow", "pydantic", "yaml", "datasets", "tokenizers"}
    assert not heavy & set(modules)
    assert len(modules) < MOST_MODULES, len(modules)
