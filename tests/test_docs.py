"""The code in the documentation runs, and does what the documentation says."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from maskprop import errors

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's blocks in order, in one namespace: `python` as they are, `pycon` as doctests."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for match in BLOCK.finditer(text):
        language, code = match.groups()
        line = text[: match.start(2)].count("\n")
        if language == "python":
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        elif language == "pycon":
            test = doctest.DocTestParser().get_doctest(code, namespace, page.name, str(page), line)
            report: list[str] = []
            runner.run(test, out=report.append, clear_globs=False)
            namespace.update(test.globs)
            assert not report, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_error_has_a_section() -> None:
    bases = (errors.MaskpropError, errors.MaskError)  # never raised themselves
    raised = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.MaskpropError) and value not in bases
    }
    sections = set(re.findall(r"^#+ `(\w+)`$", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.M))
    assert raised <= sections
    assert sections <= set(vars(errors))


def test_ci_finds_the_commands() -> None:
    """`.ci/run` runs what the README says: the marked blocks exist and are the ones it names."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"\$\(readme_command (\w+)\)", script)
    assert names == ["demo", "tests"]
    for name in names:
        assert re.search(rf"^<!-- command: {name} -->\n```sh\n.+\n```$", readme, re.M | re.S)
    bash = shutil.which("bash")
    if bash is not None:
        subprocess.run([bash, "-n", str(ROOT / ".ci" / "run")], check=True)
