"""Layers: modules import only from layers below; no late import, none for types alone, and none by name hides one that does not.

common < losses < args < data < base (batch < model < train) < models < scripts, eval, benchmarks
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Modules that are run with -m or as scripts: they import what they need, and nobody imports them.
ENTRY_POINTS = {
    "data.check",
    "data.sample",
    "data.shapes",
    "scripts.generate",
    "merge_lora",
    "train_sft",
    "train_dpo",
    "train_rm",
    "train_ppo",
}
# Modules of base by layer; a layer does not import from those above.
BASE = [
    {
        "batch",
        "collator",
        "corruption",
        "features",
        "image_tokens",
        "images",
        "layout",
        "packing",
        "processor",
        "resolution",
        "row_checks",
        "segments",
        "template",
        "videos",
        "views",
    },
    {
        "adapters",
        "fast_lora",
        "heads",
        "loading",
        "logps",
        "lora_start",
        "model",
        "other_heads",
        "packed_attention",
        "reward",
        "rollout_cache",
        "value",
    },
    {
        "answer_samples",
        "bad_steps",
        "calibration",
        "callbacks",
        "charts",
        "checkpoints",
        "hub",
        "dynamic_sampling",
        "learning_rates",
        "log_lines",
        "fsdp",
        "ppo_batches",
        "ppo_metrics",
        "ppo_trainer",
        "model_card",
        "on_policy",
        "online_dpo",
        "preference_inputs",
        "reference_cache",
        "reference_pass",
        "resume",
        "reward_functions",
        "reward_calls",
        "rewards",
        "rm_trainer",
        "run_folder",
        "run_page",
        "run_warnings",
        "rollout",
        "samples",
        "sampling",
        "self_check",
        "server_rollouts",
        "shared_prefill",
        "trainer",
        "update_loop",
        "vl_trainer",
    },
]
LAYERS = ["common", "losses", "args", "data", *range(len(BASE)), "models", "top"]
# Families are plug-ins, found by name when a checkpoint is loaded; benchmarks.startup imports a script by its name. Nothing else is imported so.
BY_NAME = {"base.loading", "models", "benchmarks.memory", "benchmarks.startup"}


def modules() -> dict[str, Path]:
    """Every module of the project but the tests: dotted name -> file."""
    folders = ("common", "losses", "args", "data", "base", "models", "scripts", "eval", "benchmarks")
    files = [*ROOT.glob("*.py"), *(f for folder in folders for f in (ROOT / folder).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = modules()


def imports(name: str) -> list[tuple[str, bool, int]]:
    """The project's modules that a module imports: (name, whether late, line)."""
    found = []
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            if target and target != name:
                found.append((target, bool(node.col_offset), node.lineno))
    return found


def layer(name: str) -> int:
    """Place of a module in LAYERS."""
    package, _, rest = name.partition(".")
    if name in ENTRY_POINTS or package in ("scripts", "eval", "benchmarks"):
        return LAYERS.index("top")
    if package != "base":
        return LAYERS.index(package)
    if not rest:
        return LAYERS.index(0)
    return LAYERS.index(next(i for i, names in enumerate(BASE) if rest in names))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_down(name: str):
    for target, late, line in imports(name):
        where = f"{name}, line {line}, imports {target}"
        assert layer(target) <= layer(name), f"{where}, which lies above it"
        assert not late, f"{where} inside a function or for types alone: move what is needed down"
        assert target not in ENTRY_POINTS or name in ENTRY_POINTS or layer(name) == len(LAYERS) - 1, where


def test_no_circles():
    """No module imports itself through others."""
    edges = {name: {t for t, _, _ in imports(name)} for name in MODULES}
    order: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in order:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            order[name] = len(order)

    for name in sorted(MODULES):
        visit(name, ())
    assert len(order) == len(MODULES)


def test_only_families_are_found_by_name():
    for name, file in MODULES.items():
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)}
        assert name in BY_NAME or not calls & {"importlib.import_module", "import_module", "__import__"}, name
