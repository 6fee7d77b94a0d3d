"""What `make gpu-check` checks on a GPU, one test a check."""

import pytest
import torch

from tests.campaigns.gpu_check import CHECKS, LeftOutError, Place

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_on_a_gpu(check, tmp_path):
    try:
        check(Place(torch.device("cuda"), tmp_path))
    except LeftOutError as reason:
        pytest.skip(str(reason))
