"""The structure of the repository: the story on the root, rooms behind it, arrows one way, all of it in the README."""

import ast
import re
from pathlib import Path

from tests.conftest import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("train_*.py")} | {"evaluate_stable_diffusion", "sample_stable_diffusion"}
NETWORKS = {"vae_model", "noise_schedule", "diffusion_model", "text_encoder", "guidance", "samplers", "images", "lora"}
NETWORKS |= {"layers"}
PACKAGES = {"monsters", "published", "training", "evaluation", "benchmarks", "lesson", "sampling"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("*.py"), *(p for package in PACKAGES for p in (ROOT / package).glob("*.py"))]
}


def imports_of(path: Path) -> set[str]:
    """The modules of this repository that a file imports, wherever in it: also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
    return found & MODULES.keys()


ARROWS = {name: imports_of(path) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_no_circles() -> None:
    """Modules can be laid out so that every import points the same way. A package's own modules see past its front."""
    left = {
        name: {target for target in targets if not (room(name) == target and name != target)}
        for name, targets in ARROWS.items()
    }
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in or behind a circle: {sorted(left)}"


def test_arrows_point_from_the_story_to_the_rooms() -> None:
    for name, targets in ARROWS.items():
        assert not targets & SCRIPTS or room(name) == "benchmarks", f"{name} imports a script"
        rooms = {room(target) for target in targets}
        assert "evaluation" not in rooms or name in SCRIPTS or room(name) in ("evaluation", "benchmarks"), name
        if name in NETWORKS:
            assert rooms <= NETWORKS, f"{name} is a network and imports {rooms - NETWORKS}"
        if room(name) == "published":
            assert not rooms & {"training", "monsters", "pokemon_dataset", "stable_diffusion_model"}, name
        if room(name) == "monsters":
            assert rooms == {"monsters"} or not rooms, name
        if room(name) == "training":
            assert not rooms & {"pokemon_dataset", "monsters"}, name
        if name in ("sampling.request", "sampling.packed", "stable_diffusion_model"):
            assert not rooms & {"training", "monsters", "pokemon_dataset"}, name


def test_few_files_on_the_root_and_none_too_long() -> None:
    on_root = list(ROOT.glob("*.py"))
    assert len(on_root) <= 16
    for path in on_root:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path.name


def test_every_part_is_on_the_map() -> None:
    """Each module, and each package's modules, is named in the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, path in MODULES.items():
        if path.stem not in ("__init__", "__main__"):
            word = path.name if "." not in name else path.stem
            assert re.search(rf"\b{re.escape(word)}\b", readme), f"README.md does not name {name}"


def test_links_of_the_readme_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "stable_diffusion_results" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+?)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
