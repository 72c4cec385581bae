"""What is installed is what is in the tree."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {"smcscale": "smcscale", "smcscale.kernels": "kernels", "smcscale.models": "models"}
DATA = (".json", ".safetensors", ".md")


def installed_name(path: Path) -> str:
    """`kernels/resampling/schemes.py` -> `smcscale/kernels/resampling/schemes.py`."""
    inside = path.relative_to(ROOT).as_posix()
    return inside if inside.startswith("smcscale/") else f"smcscale/{inside}"


def expected_files() -> set[str]:
    """Every file of the tree that must be installed, by its installed name."""
    found = {"smcscale/py.typed"}
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*"):
            shipped = path.suffix == ".py" or (
                path.suffix in DATA and "models/pretrained" in path.as_posix()
            )
            if shipped and path.is_file():
                found.add(installed_name(path))
    return found


def test_every_package_is_listed():
    packages = {
        ".".join(Path(name).parts[:-1])
        for name in expected_files()
        if name.endswith("/__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == packages
    assert SETUPTOOLS["package-dir"] == FOLDERS


def test_every_folder_with_modules_is_a_package():
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


def test_constraints_are_pins_without_addresses():
    pins = set()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(
            r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+( ; python_version [<>=]+ '3\.\d+')?", line
        )
        pins.add(re.sub(r"[-_.]+", "-", line.split("==")[0]).lower())
    extras = PROJECT["project"]["optional-dependencies"]
    asked = PROJECT["project"]["dependencies"] + extras["dev"] + extras["parity"]
    names = {re.split(r"[\[<>=; ]", entry)[0] for entry in asked} - {"smcscale"}
    missing = {n for n in names if re.sub(r"[-_.]+", "-", n).lower() not in pins}
    assert not missing, f"constraints.txt pins no version of {missing}"


def test_importing_loads_no_extra():
    """`import smcscale` needs the core dependencies alone, and starts no device."""
    code = (
        "import sys, smcscale\n"
        "extras = {'arviz', 'arch', 'statsmodels', 'matplotlib', 'openai', 'torch', 'pandas'}\n"
        "print(sorted(extras & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A source archive of a copy of the tree, and the wheel built from that archive."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    build = (
        "import setuptools.build_meta as b, sys; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    )

    def make(kind: str, source: Path) -> Path:
        command = [sys.executable, "-c", build, kind, str(folder)]
        subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=300)
        return next(folder.glob("*.tar.gz" if kind == "sdist" else "*.whl"))

    source_archive = make("sdist", tree)
    with tarfile.open(source_archive) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return source_archive, make("wheel", next((folder / "unpacked").iterdir()))


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(archives):
    names = set(zipfile.ZipFile(archives[1]).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == expected_files()


@pytest.mark.slow
def test_the_wheel_runs_from_an_empty_folder(archives, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(archives[1])], check=True, timeout=300)
    code = f"""
import jax, smcscale
assert smcscale.__file__.startswith({str(target)!r}), smcscale.__file__
from smcscale import SMC, ParticleFilter
from smcscale.kernels import resampling
from smcscale.models.statespace import stochastic_volatility
smc = SMC(ParticleFilter(stochastic_volatility, resampling=resampling.systematic),
          num_particles=100, progress_bar=False)
smc.run(jax.random.key(0), jax.numpy.zeros(5))
print(float(smc.log_evidence[0]))
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert -20 < float(run.stdout) < 0
