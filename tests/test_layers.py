"""The layers of docs/concepts.md: a module imports only from those below its own, so none imports in a circle."""

import ast
import itertools
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ssl_jax"
# Lowest first; what stands in one line does not import from each other.
LAYERS = [
    {"errors"},
    {"registry", "files", "progress", "hlo", "parallel", "interrupts", "start", "completion", "neighbours"},
    {"huge_pages", "command_table"},
    {"fields", "checkpoint", "plotting"},
    {"config"},
    {"collapse", "losses", "augment", "transforms", "run_folder", "config_file"},
    {"network", "settings"},
    {"models"},
    {"methods"},
    {"data"},
    {"encoder", "labelling"},
    {"evaluate", "selection"},
    {"classifier"},
    {"train"},
    {"load", "testing", "audit", "phantom", "linear_protocol"},
    {"report"},
    {"study", "plan", "evaluation", "dry_runs", "sklearn", "check", "searching", "comparing", "to_label", "weights"},
    {"sweep", "transfer"},
    {"outputs"},
    {"embedding"},
    {"exporting"},
    {"commands"},
    {"reproduce"},
    {"cli"},
]
HEIGHT = {unit: height for height, layer in enumerate(LAYERS) for unit in layer}


def units(name: str, module: ast.AST):
    """The packages and modules of ssl_jax that a module imports from, wherever in it the import stands."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module == "ssl_jax":
            yield from (alias.name for alias in node.names if alias.name in HEIGHT)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssl_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ssl_jax."))


def test_modules_import_only_from_lower_layers():
    upwards = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in units(own, ast.parse(path.read_text())):
            if other != own and HEIGHT[other] >= HEIGHT[own]:
                upwards.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not upwards


def test_every_module_has_a_layer():
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    found -= {"__init__", "__pycache__", "configs"}
    assert found == set(itertools.chain.from_iterable(LAYERS))
