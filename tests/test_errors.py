"""The error family: one base, natural built-in parents, and extras named where they are missing."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import maskprop
from maskprop import errors
from maskprop._extras import require

FAMILY = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
]


@pytest.mark.parametrize("error", FAMILY)
def test_family(error: type[Exception]) -> None:
    assert issubclass(error, (errors.MaskpropError, errors.MaskpropWarning))
    assert inspect.getdoc(error)


def test_natural_parents() -> None:
    assert issubclass(errors.MaskError, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)
    assert issubclass(errors.UnsupportedOpError, NotImplementedError)
    assert not issubclass(errors.MaskpropWarning, errors.MaskpropError)


def test_missing_extra() -> None:
    with pytest.raises(errors.MissingExtraError) as caught:
        require("no_such_package.part", "report", "maskprop demo")
    assert str(caught.value) == (
        "maskprop demo needs the package 'no_such_package', which is not installed. "
        "Install it with: pip install 'maskprop[report]'"
    )


def test_broken_extra_keeps_its_own_error(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "broken_extra.py").write_text("import another_missing_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_missing_package"):
        require("broken_extra", "report", "this test")


def test_public_names_exist() -> None:
    for name in maskprop.__all__:
        assert getattr(maskprop, name) is not None
        assert name in dir(maskprop)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        maskprop.nothing  # noqa: B018


def test_import_is_quick() -> None:
    """What takes long to import comes with its first use; `.ci/run` holds the seconds against a bound."""
    slow = {"scipy", "networkx", "matplotlib", "onnx", "transformers"}
    code = f"import sys; from maskprop import *; print(sorted({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_import_is_lazy() -> None:
    code = "import sys, maskprop, maskprop.errors; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
