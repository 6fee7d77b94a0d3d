"""The matrix of versions: `make versions`, or single cells by the names of `nox --list`, each in its own environment.

    nox                                                    # the cells of CELLS, `lowest` and `checkpoints`
    nox -s "versions-3.12(transformers='5.24.0', torch='2.6.0')"
    nox -s table                                           # the results so far, as a table

A cell installs the package with everything its tests need and runs the tests that depend on versions: about 4 minutes
of CPU. The first cell with a version of torch fetches it. A CUDA build takes 3 GB to download and 5 GB of disk; with
UV_TORCH_BACKEND=cpu it takes 0.2 GB and 1 GB. Cells share it by hard links, like the rest of an environment (2 GB).
"""

from __future__ import annotations

import json
import os
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import nox

# Oldest, middle and newest. Of the 27 combinations, these nine contain every pair of versions once.
PYTHON = ["3.11", "3.12", "3.13"]
TRANSFORMERS = ["5.0.0", "5.12.1", "5.24.0"]
TORCH = ["2.6.0", "2.13.0", "2.14.1"]
CELLS = [(0, 0, 0), (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 1, 1), (1, 2, 0), (2, 0, 1), (2, 1, 0), (2, 2, 2)]

# Tests that depend on versions of other libraries, without slow ones that would show nothing more.
SUITES = (
    "unit/saving unit/folding unit/detection unit/kernels unit/test_calibration.py unit/test_cli.py "
    "unit/test_conversion.py unit/test_modeling_adanorm.py unit/test_patching.py unit/test_settings.py "
    "unit/test_swapping.py integration/test_gpu.py integration/test_saving.py integration/test_security.py "
    "integration/test_trainer.py "
)
AT_THE_BOUNDS = (
    "integration/test_hub.py recipes/tasks recipes/test_classification.py recipes/test_language_modeling.py "
    "recipes/test_parsing.py recipes/test_translation.py"
)
SLOW = (
    "compile or two_processes or more_memory or (whatever_is_imported_first and not Trainer) or imported_later "
    "or unpickle or pushes or broken_upload or stopped or killed or ctrl_c or bad_input or every_config"
)
RESULTS = Path("outputs/versions.jsonl")
EXTRAS = ("demo", "plots", "recipes", "test")
# uv does not compile bytecode: if Python wrote none either, every test process would compile torch and transformers.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = [
    *(f"versions-{PYTHON[p]}(transformers='{TRANSFORMERS[t]}', torch='{TORCH[c]}')" for p, t, c in CELLS),
    "lowest",
    "checkpoints",
    "table",
]


def run_suites(session: nox.Session, suites: str) -> None:
    """Run `suites`, and append to RESULTS one line with the versions and the outcome."""
    report, before = Path(session.create_tmp(), "report.xml").resolve(), os.times()
    ran = session.run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
        *(session.posargs or ["-k", f"not ({SLOW})", *(f"tests/{suite}" for suite in suites.split())]),
        env=ENVIRONMENT, success_codes=[0, 1],
    )  # fmt: skip
    if ran is None or session.posargs:  # installed only, or a part
        return
    after, suite = os.times(), ET.parse(report).getroot()[0]
    told = session.run(
        "python",
        "-c",
        "import json, sys, torch, transformers as t; print(json.dumps([sys.version.split()[0], t.__version__, "
        "torch.__version__]))",
        silent=True,
    )
    row = dict(zip(("python", "transformers", "torch"), json.loads(told.splitlines()[-1]), strict=True))
    row["cell"] = session.name
    row |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    row["cpu_seconds"] = round(sum(after[2:4]) - sum(before[2:4]))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if row["failures"] or row["errors"]:
        session.error(f"{row['failures']} tests failed, {row['errors']} with errors")


@nox.session(python=PYTHON)
@nox.parametrize("torch", TORCH)
@nox.parametrize("transformers", TRANSFORMERS)
def versions(session: nox.Session, transformers: str, torch: str) -> None:
    """Run the core suites with one version each of Python, transformers and torch, the rest as new as possible."""
    session.install(f"torch=={torch}", f"transformers=={transformers}", "-e", f".[{','.join(EXTRAS)}]")
    run_suites(session, SUITES)


@nox.session(python=PYTHON[0])
def lowest(session: nox.Session) -> None:
    """Run the same suites and those of the recipes and the Hub, with every dependency at its lower bound."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *(need for extra in EXTRAS for need in project["optional-dependencies"][extra])]
    session.install(*(need.replace(">=", "==") for need in needs if "[" not in need), "-e", ".")
    run_suites(session, SUITES + AT_THE_BOUNDS)


@nox.session(python=PYTHON[0])
def checkpoints(session: nox.Session) -> None:
    """Save checkpoints under each version of transformers and load them under every version."""
    folder, script = Path(session.create_tmp(), "checkpoints"), "tests/campaigns/checkpoints.py"
    session.install(f"torch=={TORCH[1]}", "-e", f".[{','.join(EXTRAS)}]")
    saves, loads = [["save", folder]], [["load", folder], ["load", folder, "--trust"]]
    for commands, versions in ((saves, TRANSFORMERS), (loads, reversed(TRANSFORMERS))):
        for version in versions:
            session.install(f"transformers=={version}")
            for what in commands:
                session.run("python", script, *map(str, what), env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"})
    session.run("python", script, "report", str(folder))


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Print the last run of each cell as a Markdown table."""
    rows = {(row := json.loads(line))["cell"]: row for line in RESULTS.read_text(encoding="utf-8").splitlines()}
    print("| Python | transformers | torch | passed | skipped | failed | CPU minutes |\n|---|---|---|---|---|---|---|")
    for row in rows.values():
        failed = row["failures"] + row["errors"]
        passed = row["tests"] - failed - row["skipped"]
        print("| {python} | {transformers} | {torch} |".format(**row), end="")
        print(f" {passed} | {row['skipped']} | {failed} | {row['cpu_seconds'] / 60:.1f} |")
