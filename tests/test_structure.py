"""The house: which room may import which, as CONTRIBUTING.md shows it, and no function that is a house of its own.

`python tests/test_structure.py` writes the picture of the rooms into CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from star import document

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PICTURE = "picture of the rooms"

# From the top to the ground. A room imports from lower floors only, never from its own.
FLOORS: tuple[dict[str, str], ...] = (
    {"star.cli": "the commands"},
    {"star.app": "star app: a page where an image forms, with its maps and weights"},
    {
        "star.study": "star compare: arms and seeds, their statistics and why",
        "star.trace": "an image of any pipeline as it forms, with its maps",
    },
    {
        "star.options": "options of star eval, star maps, star probe, star check and star app",
        "star.check": "what holds for a pipeline before a run",
        "star.train": "the loop: rollout, reward, advantage, allocation, update",
        "star.shapes": "the embedded world: a model, its prompts and its reward",
    },
    {"star.training": "what the loop calls: rollout, scoring, policy, advantage, checkpoints, processes"},
    {
        "star.reports": "metrics, figures, pages and cards; they know no pipeline",
        "star.presets": "configurations with a name",
        "star.document": "marked parts of a document, which tools fill",
    },
    {
        "star": "what other trainers import, loaded when used",
        "star.config": "what a run is made of",
        "star.rewards": "rewards, one file each, and the worker that runs them",
    },
    {"star.capture": "maps of a transformer's attention"},
    {
        "star.layouts": "where image and text lie in each kind of transformer",
        "star.tap": "the attention call of a processor, seen",
    },
    {
        "star.concepts": "prompts to concepts to tokens",
        "star.objective": "maps to weights, and losses that take them; torch alone",
        "star.files": "files that are whole or as before",
    },
    {
        "star.transition": "a sampler's step as a*x + b*v + s*noise",
        "star.messages": "texts of others on one line",
    },
    {"star_kernels": "the operators; torch alone"},
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

KERNEL_FLOORS: tuple[tuple[str, ...], ...] = (
    ("star_kernels",),
    ("star_kernels.api",),
    ("star_kernels.autograd", "star_kernels.native"),
    ("star_kernels.ops",),
    ("star_kernels.reference", "star_kernels.triton"),
    ("star_kernels.checks", "star_kernels.transition", "star_kernels.requirements", "star_kernels._build"),
)
IMPLEMENTATIONS = ("star_kernels.reference", "star_kernels.native", "star_kernels.triton")

# Third parties that light rooms may import; Triton is imported by its kernels alone, and those on demand.
LIGHT = {
    "star_kernels": {"torch"},
    "star_kernels.triton": {"torch", "triton"},
    "star.objective": {"torch"},
    "star.transition": {"torch"},
}
MODELS = {"diffusers", "transformers", "peft"}  # which reports do without

LINES, PARAMETERS = 100, 12
DOORS = {
    "star_kernels.api.policy_loss": "the operator's door: what a loss takes and its options, each checked",
    "star_kernels.api.nft_loss": "the operator's door: what a loss takes and its options, each checked",
    "star_kernels.reference.nft_loss": "the specification: the whole formula on one page, with all its arguments",
    "star_kernels.reference.nft_loss_gradient": "the specification of the gradient, with the same arguments",
    "star_kernels.reference.policy_loss": "the specification: the whole formula on one page, with all its arguments",
    "star_kernels.reference.policy_loss_gradient": "the specification of the gradient, with the same arguments",
    "star_kernels.triton.policy_loss.launch": "the operator's arguments, as the dispatcher gives them",
    "star_kernels.triton.policy_loss.launch_gradient": "the operator's arguments, as the dispatcher gives them",
    "star_kernels.triton.policy_loss.ratios_kernel": "a kernel: its parts share values in registers",
    "star_kernels.triton.nft_loss.launch": "the operator's arguments, as the dispatcher gives them",
    "star_kernels.triton.nft_loss.launch_gradient": "the operator's arguments, as the dispatcher gives them",
    "star_kernels.triton.allocate.allocate_kernel": "a kernel: its parts share values in registers",
    "star.objective.grpo.fused_grpo_loss": "stands where a trainer has its loss, and takes what trainers hold",
}


def python_files() -> dict[str, Path]:
    """Modules of both packages by name."""
    found = {}
    for package, folder in (("star", ROOT / "python" / "star"), ("star_kernels", ROOT / "star_kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


FILES = python_files()


def statements(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """Nodes of a module. Without those inside functions they are what runs when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from statements(node, inside_functions)


def imports(module: str, inside_functions: bool = True) -> dict[str, int]:
    """What a module imports, by full name, with a line number: modules of ours, or names in others."""
    names: dict[str, int] = {}
    for node in statements(ast.parse(FILES[module].read_text()), inside_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names[inner if inner in FILES else str(node.module)] = node.lineno
    return {name: line for name, line in names.items() if name != module}


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in ("star", "star_kernels")


def room_of(module: str, rooms) -> str:
    """The longest room's name that the module is in. `star` itself is a room, and holds no other module."""
    name = module
    while name not in rooms or (name == "star" and module != "star"):
        assert "." in name, f"{module} is in no room: add it to tests/test_structure.py"
        name = name.rpartition(".")[0]
    return name


def picture() -> str:
    """The floors as CONTRIBUTING.md shows them."""
    width = max(map(len, ROOMS))
    floors = ["\n".join(f"{room:<{width}}  {what}" for room, what in rooms.items()) for rooms in FLOORS]
    return "```text\n" + "\n\n".join(floors) + "\n```"


def test_the_picture_in_contributing_is_this_one():
    before, after = document.surroundings(CONTRIBUTING, PICTURE)
    assert CONTRIBUTING.read_text()[len(before) : -len(after)].strip() == picture()


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down(module):
    """Imports inside functions too: a lazy import is no way around the picture."""
    room = room_of(module, ROOMS)
    for name, line in imports(module).items():
        if is_ours(name):
            imported = room_of(name, ROOMS)
            assert imported == room or ROOMS[imported] > ROOMS[room], f"{FILES[module]}:{line}: {room} -> {imported}"


@pytest.mark.parametrize("module", sorted(module for module in FILES if module.startswith("star_kernels")))
def test_imports_within_the_kernels_go_down(module):
    floors = {name: floor for floor, names in enumerate(KERNEL_FLOORS) for name in names}
    own = room_of(module, floors) if module != "star_kernels" else module
    for name, line in imports(module).items():
        if is_ours(name):
            imported = room_of(name, floors)
            assert imported == own or floors[imported] > floors[own], f"{FILES[module]}:{line}: {own} -> {imported}"
            both = {own, imported}
            assert own == imported or not both <= set(IMPLEMENTATIONS), f"{FILES[module]}:{line}: {own} -> {imported}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module: {name for name in imports(module, inside_functions=False) if name in FILES and name != "star"}
        for module in FILES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def third_parties(module: str) -> set[str]:
    tops = {name.partition(".")[0] for name in imports(module) if not is_ours(name)}
    return tops - set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [module for module in sorted(FILES) if module.startswith(tuple(LIGHT))])
def test_light_rooms_need_little(module):
    allowed = next(LIGHT[room] for room in sorted(LIGHT, key=len, reverse=True) if f"{module}.".startswith(f"{room}."))
    assert third_parties(module) <= allowed


def test_reports_know_no_pipeline():
    reports = [module for module in FILES if module.startswith("star.reports")]
    assert reports
    assert not [module for module in reports if third_parties(module) & MODELS]


def guests(module: str) -> list[str]:
    """Where a module imports the embedded world."""
    found = imports(module).items()
    return [f"{FILES[module]}:{line}" for name, line in found if f"{name}.".startswith("star.shapes.")]


def test_the_guest_is_imported_by_the_study_alone():
    for module in FILES:
        if room_of(module, ROOMS) not in ("star.shapes", "star.study"):
            found = guests(module)
            assert not found, f"{found[0]}: imports star.shapes"


def lines_outside_shapes(word: str) -> list[str]:
    """Lines of `star` with a word, outside the embedded world."""
    found = []
    for module, path in sorted(FILES.items()):
        if module.startswith("star.") and not module.startswith("star.shapes"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if word in line:
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def test_the_embedded_world_is_named_in_few_places():
    """A pipeline, prompts and a reward of one's own are tasks as it is; whoever asks for its name makes it special."""
    named = lines_outside_shapes('"shapes"')
    assert len(named) <= 3, "\n".join(named)
    found = {guest for module in FILES if not f"{module}.".startswith("star.shapes.") for guest in guests(module)}
    assert len(found) <= 2, "\n".join(found)


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}.{node.name}", node


def parameters(function: ast.FunctionDef) -> int:
    """Without self, and none of a Triton kernel's: those are pointers, strides and sizes of memory."""
    if any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list):
        return 0
    every = function.args
    names = [*every.posonlyargs, *every.args, *every.kwonlyargs, *filter(None, (every.vararg, every.kwarg))]
    return sum(argument.arg not in ("self", "cls") for argument in names)


def is_big(function: ast.FunctionDef) -> bool:
    return (function.end_lineno or 0) - function.lineno + 1 > LINES or parameters(function) > PARAMETERS


def test_functions_are_short_and_take_little():
    """A door that has become small leaves the list."""
    assert {name for name, function in functions() if is_big(function)} == set(DOORS)


if __name__ == "__main__":
    document.fill(CONTRIBUTING, {PICTURE: picture()})
