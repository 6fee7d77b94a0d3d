"""The folder of a study takes up runs with the same options alone."""

from argparse import Namespace

import pytest

from common.options import OptionError
from studies.folder import claim


def test_other_options_are_refused_by_name_but_those_that_are_free(tmp_path):
    options = Namespace(steps=3, rates=[0.1, 0.2], output_dir=tmp_path, summary_only=False)
    claim(tmp_path / "out", options, free={"summary_only"})
    claim(tmp_path / "out", Namespace(**{**vars(options), "summary_only": True}), free={"summary_only"})
    with pytest.raises(OptionError, match=r"with other options \(--steps 3 then, 4 now\); give the same ones"):
        claim(tmp_path / "out", Namespace(**{**vars(options), "steps": 4}), free={"summary_only"})
