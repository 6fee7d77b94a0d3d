"""Packages whose names are imported when they are used."""

import subprocess
import sys

import pytest

import hf_adanorm.diagnostics
import hf_adanorm.saving


@pytest.mark.parametrize("package", [hf_adanorm, hf_adanorm.saving, hf_adanorm.diagnostics], ids=lambda p: p.__name__)
def test_an_unknown_name_is_said_to_be_none(package):
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_a_name_brings_its_own_module_alone():
    code = "import sys; from hf_adanorm.saving import write_file; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_listed_before_they_are_imported():
    code = "import hf_adanorm; assert {'patch_model', 'plots', 'Fold'} <= {*dir(hf_adanorm)}"
    subprocess.run([sys.executable, "-c", code], check=True)
