"""test_layout.py - the rooms: what may import what, no circle, and a top level that holds what a user types."""
import ast
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("ops", "fronts", "runs", "data", "experiments", "bench")
BELOW = {"objectives", "aggregate", "ops", "runs", "model", "svd_lora"}
# a room, or a file of the top level -> what it may import. runs.files is the ground floor: everybody may
MAY = {
    "objectives": set(), "aggregate": set(), "ops": set(),
    "runs": {"ops", "svd_lora"},
    "families": set(), "model": {"ops", "families"}, "svd_lora": {"ops", "model"},
    "data": BELOW, "fronts": BELOW | {"data"}, "eval_front": BELOW | {"data", "fronts"},
    "export": BELOW | {"data", "families", "fronts"}, "chat": BELOW | {"data", "fronts"},
    "train": BELOW | {"data", "fronts", "eval_front"},
    "experiments": BELOW | {"data", "fronts", "eval_front"},
    "bench": BELOW | {"data", "fronts", "eval_front", "export"},
}
PURE = {"objectives", "aggregate", "ops"}           # not even the ground floor


def room(module):
    """The room of a module ("data.toy" -> "data"), its own name at the top level, "train" for every train_ script."""
    top = module.split(".")[0]
    return "train" if top.startswith("train_") else top


def sources(root):
    """{module: its text} of everything in the house but tests."""
    files = [*root.glob("*.py"), *(f for r in ROOMS for f in (root / r).rglob("*.py"))]
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f.read_text(encoding="utf-8")
            for f in files}


@lru_cache(maxsize=None)
def imported(text):
    """The names that a text imports, wherever the import stands: functions count too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(texts):
    """{module: the project's modules that it imports}. texts: {module: text}"""
    # `from data import toy` imports data.toy; the package itself is an empty room
    return {name: {x for x in imported(text) & set(texts) if x not in ROOMS} - {name} for name, text in texts.items()}


def circles(graph):
    """The modules that reach themselves."""
    def reach(node, seen):
        for other in graph.get(node, ()):
            if other not in seen:
                seen.add(other)
                reach(other, seen)
        return seen
    return sorted(node for node in graph if node in reach(node, set()))


def wrong_arrows(graph):
    """The imports that MAY does not allow, as pairs."""
    wrong = []
    for module, others in graph.items():
        here = room(module)
        for other in sorted(others):
            ground = other == "runs.files" and here not in PURE
            inside = room(other) == here and here in ROOMS
            if not (ground or inside or room(other) in MAY[here]):
                wrong.append((module, other))
    return wrong


def test_arrows_go_one_way():
    graph = imports(sources(ROOT))
    assert len(graph) > 40 and graph["train_dpo"] >= {"model", "svd_lora"} - {"model"}
    assert wrong_arrows(graph) == []


def test_no_circle():
    assert circles(imports(sources(ROOT))) == []


def test_nothing_imports_a_train_script_or_an_experiment():
    for module, others in imports(sources(ROOT)).items():
        assert not [x for x in others if room(x) in ("train", "experiments", "bench") and room(module) != room(x)
                    or room(x) == "train"], module


def test_the_ground_floor_imports_nothing():
    assert imports(sources(ROOT))["runs.files"] == set()


@pytest.mark.parametrize("line, wrong", [
    ("def f():\n    from fronts import tables", "an arrow"), ("import train_dpo", "a circle"),
    ("def f():\n    import svd_lora", "a circle"), ("from runs.files import UserError", None)])
def test_the_rules_can_fail(line, wrong):
    """The same imports, with one line more in model.py."""
    texts = sources(ROOT)
    graph = imports(texts | {"model": texts["model"] + "\n\n" + line + "\n"})
    assert bool(wrong_arrows(graph)) == (wrong is not None)
    assert bool(circles(graph)) == (wrong == "a circle")


def test_the_top_level():
    card = ("model families svd_lora objectives aggregate train_base train_dpo train_ppo train_sft train_reward "
            "train_hqd eval_front export")
    later = {"chat"}
    files = {f.stem for f in ROOT.glob("*.py")}
    assert set(card.split()) <= files <= set(card.split()) | later and len(files) <= 14
    names = {f.stem for f in ROOT.rglob("*.py") if "out" not in f.relative_to(ROOT).parts}
    assert "kernels" not in names                             # it would shadow a package that transformers imports


def test_every_room_says_what_may_live_there():
    for folder in ("ops", "fronts", "runs", "data", "experiments"):
        text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert text.startswith(f"{folder}/") and "May not" in text, folder
