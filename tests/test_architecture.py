"""Who may import whom: every module of the project belongs to a layer, and imports what its layer may."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("telemetry", "trainer", "dashboards")

BASE = ("telemetry.measures", "telemetry.records", "telemetry.catalogue", "telemetry.charts")
READING = (*BASE, "telemetry.families")
TELEMETRY_OF_CALLBACKS = (
    *READING, "telemetry.clock", "telemetry.probes", "telemetry.recorder", "telemetry.reduction", "telemetry.health",
    "telemetry.callbacks", "telemetry.backends.base", "telemetry.sound", "telemetry.speech",
)  # fmt: skip

# Layer (a module and what lies under it, the longest that fits) → what its modules may import of the project.
ALLOWED: dict[str, tuple[str, ...]] = {
    "telemetry.measures": BASE,
    "telemetry.records": BASE,
    "telemetry.catalogue": BASE,
    "telemetry.charts": ("telemetry.catalogue",),
    "telemetry.families": READING,
    "telemetry.probes": (*READING, "telemetry.clock", "telemetry.probes"),
    # Ranks that run the model together first agree, as those that gather do, that all of them are here.
    "telemetry.probes.lockstep": ("telemetry.reduction",),
    # Loading a model draws random numbers that training must not miss.
    "telemetry.speech": ("telemetry.speech", "telemetry.probes.quiet"),
    "telemetry.health": ("telemetry.records", "telemetry.catalogue", "telemetry.health"),
    "telemetry.backends": ("telemetry.records", "telemetry.catalogue", "telemetry.charts", "telemetry.backends"),
    # Its client waits for a server: it has a queue and a thread of its own, and ends before the client's exit hooks.
    "telemetry.backends.wandb": (
        "telemetry.records", "telemetry.catalogue", "telemetry.backends",
        "telemetry.worker", "telemetry.shutdown", "telemetry.redaction",
    ),
    "telemetry.clock": (),
    "telemetry.redaction": (),
    "telemetry.sound": ("telemetry.records",),
    "telemetry.transfer": (),
    "telemetry.worker": (),
    "telemetry.shutdown": (),
    "telemetry.reduction": ("telemetry.records",),
    "telemetry.recorder": (
        "telemetry.records", "telemetry.catalogue", "telemetry.backends.base",
        "telemetry.clock", "telemetry.transfer", "telemetry.worker", "telemetry.shutdown", "telemetry.reduction",
        "telemetry.sound",
    ),
    "telemetry.logs": (),
    "telemetry.callbacks": TELEMETRY_OF_CALLBACKS,
    # The one callback module that knows concrete backends: where a user names none, it makes the default ones.
    "telemetry.callbacks.session": (
        *TELEMETRY_OF_CALLBACKS, "telemetry.redaction", "telemetry.backends.tensorboard", "telemetry.backends.console",
        "telemetry.backends.wandb", "telemetry.backends.trackio",
    ),
    "telemetry": ("telemetry",),  # the package's own __init__, which gives the public names
    "dashboards": ("dashboards", "telemetry.records", "telemetry.catalogue", "telemetry.charts"),
    "trainer": ("trainer", "telemetry:public"),
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Name → file of every module of the project."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = modules()


def imported(name: str, path: Path) -> Iterator[str]:
    """The modules of the project that a module imports, wherever in the file; ``telemetry:Name`` for a public name."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            upward = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*upward, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield inner if inner in MODULES else f"{origin}:{alias.name}"


def of_project(target: str) -> bool:
    return target.split(".")[0].split(":")[0] in PACKAGES


def layer_of(name: str) -> str:
    """The longest layer that a module lies in; the package's own layer is for its ``__init__`` alone."""
    fitting = [layer for layer in ALLOWED if name == layer or name.startswith(f"{layer}.")]
    fitting = [layer for layer in fitting if layer != "telemetry" or name == "telemetry"]
    assert fitting, f"{name} belongs to no layer: say in ALLOWED what it may import"
    return max(fitting, key=len)


def permitted(target: str, allowed: tuple[str, ...]) -> bool:
    module, _, public_name = target.partition(":")
    if module == "telemetry" and public_name:
        return "telemetry:public" in allowed or "telemetry" in allowed
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in allowed)


def test_the_project_was_found() -> None:
    assert {"telemetry.records", "telemetry.callbacks.session", "trainer.loss", "dashboards"} <= set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_what_its_layer_may(name: str) -> None:
    allowed = ALLOWED[layer_of(name)]
    wrong = [
        target for target in imported(name, MODULES[name]) if of_project(target) and not permitted(target, allowed)
    ]
    assert wrong == []


def test_telemetry_knows_no_trainer() -> None:
    packages = {
        name: {target.split(".")[0].split(":")[0] for target in imported(name, path)}
        for name, path in MODULES.items()
        if name.split(".")[0] == "telemetry"
    }
    assert [name for name, found in packages.items() if found & {"trainer", "dashboards", "tests"}] == []


def test_the_trainer_takes_public_names_of_telemetry_only() -> None:
    taken = {
        target
        for name, path in MODULES.items()
        if name.split(".")[0] == "trainer"
        for target in imported(name, path)
        if target.split(".")[0].split(":")[0] == "telemetry"
    }
    init = ast.parse(MODULES["telemetry"].read_text(encoding="utf-8"))
    (public,) = [
        ast.literal_eval(node.value)
        for node in init.body
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]
    ]
    assert taken
    assert taken <= {f"telemetry:{name}" for name in public}


def test_only_the_session_makes_concrete_backends() -> None:
    concrete = ("telemetry.backends.tensorboard", "telemetry.backends.console", "telemetry.backends.memory")
    users = {
        name
        for name, path in MODULES.items()
        for target in imported(name, path)
        if target.startswith(concrete) and not name.startswith("telemetry.backends")
    }
    assert users - {"telemetry"} == {"telemetry.callbacks.session"}


def test_the_packages_at_the_top_are_the_three_and_the_tests() -> None:
    found = {
        path.parent.name
        for path in ROOT.glob("*/*.py")
        if not path.parent.name.startswith(".") and not (path.parent / "pyvenv.cfg").exists()
    }
    assert found - {"docs", "build", "dist"} == {*PACKAGES, "tests"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import telemetry.recorder", ["telemetry.recorder"]),
        ("from telemetry import records", ["telemetry.records"]),
        ("from telemetry import StrategicTelemetry", ["telemetry:StrategicTelemetry"]),
        ("from telemetry.records import Scalar", ["telemetry.records:Scalar"]),
        ("def f():\n    from trainer.loss import AccumulatedLoss", ["trainer.loss:AccumulatedLoss"]),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trainer",
            ["typing:TYPE_CHECKING", "trainer"],
        ),
        ("from . import recorder\nfrom ..trainer import loss", ["telemetry.recorder", "trainer.loss"]),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    assert list(imported("telemetry.module", path)) == expected
