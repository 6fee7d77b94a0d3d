"""The wrappers around transformers are installed once, whatever is imported first, and can be taken off."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, BertModel, PreTrainedConfig, PreTrainedModel, trainer

from hf_adanorm import is_patched, patch_model
from hf_adanorm.saving import install
from tests.zoo.round_trip import CASES


def tiny() -> BertModel:
    return BertModel(CASES["bert"].config())


def test_install_twice_wraps_once() -> None:
    before = PreTrainedModel.post_init, PreTrainedConfig.to_json_file
    install.install()
    assert (PreTrainedModel.post_init, PreTrainedConfig.to_json_file) == before
    assert not hasattr(PreTrainedModel.post_init.__wrapped__, "__wrapped__")


def test_uninstall_and_install_again(tmp_path: Path) -> None:
    patch_model(tiny()).save_pretrained(tmp_path)
    wrapper = PreTrainedModel.post_init
    install.uninstall()
    try:
        assert PreTrainedModel.post_init is wrapper.__wrapped__
        with pytest.raises(RuntimeError, match="size"):
            AutoModel.from_pretrained(tmp_path)
    finally:
        install.install()
    assert is_patched(AutoModel.from_pretrained(tmp_path))


@pytest.mark.filterwarnings("ignore:transformers.trainer.Trainer")
def test_a_class_that_is_gone_is_said_and_the_rest_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install.uninstall()
    monkeypatch.delattr(trainer, "Trainer")
    try:
        with pytest.warns(UserWarning, match=r"transformers\.trainer\.Trainer\.create_model_card is not there"):
            install.install()
        patch_model(tiny()).save_pretrained(tmp_path)
        assert is_patched(AutoModel.from_pretrained(tmp_path))
    finally:
        monkeypatch.undo()
        install.install()


def test_other_wrappers_on_top_go_on_working(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    ours = PreTrainedModel.post_init

    @functools.wraps(ours)
    def theirs(self: PreTrainedModel) -> None:
        seen.append(type(self).__name__)
        ours(self)

    monkeypatch.setattr(PreTrainedModel, "post_init", theirs)
    config = patch_model(tiny()).config
    assert is_patched(BertModel(config))
    assert seen == ["BertModel", "BertModel"]
    install.uninstall()
    try:
        assert not is_patched(BertModel(config))  # ours steps aside, theirs stays
        assert seen == ["BertModel"] * 3
    finally:
        monkeypatch.undo()
        install.install()


PEFT_LATER = """
import sys
import hf_adanorm.patching
from hf_adanorm.saving import install
from hf_adanorm.saving.wrapping import _ACTIVE, _FINDER
assert {"peft", "transformers.trainer"}.isdisjoint(sys.modules)
install.install()
assert sys.meta_path.count(_FINDER) == 1
import peft
from peft.config import PeftConfigMixin
assert (PeftConfigMixin, "save_pretrained") in _ACTIVE
from transformers import Trainer
assert (Trainer, "_load_from_checkpoint") in _ACTIVE
assert {"peft", "transformers.trainer"}.isdisjoint(_FINDER.waiting)
"""
NO_THREAD = """
import sys, threading
from transformers import PreTrainedModel
events, threads = [], threading.active_count()
sys.addaudithook(lambda name, args: events.append(name))
import hf_adanorm
hf_adanorm.patch_model
assert threading.active_count() == threads
assert not [name for name in events if name.startswith(("socket.", "subprocess.", "os.fork", "os.exec"))]
"""
FIRST = {
    "a model class of transformers": "from transformers import BertModel",
    "the Trainer": "from transformers import Trainer",
    "a pipeline": "from transformers import pipeline",
    "PEFT": "import peft",
    "a public name": "from hf_adanorm import AdaNorm",
    "patching": "import hf_adanorm.patching",
    "the traveling file": "import hf_adanorm.modeling_adanorm",
    "the spec": "import hf_adanorm.saving.spec",
    "the hooks": "import hf_adanorm.saving.hooks",
    "the kernels": "from hf_adanorm.kernels import fused",
}
LAZY = """
import hf_adanorm
{first}
from transformers import BertConfig, BertModel
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
model = hf_adanorm.patch_model(BertModel(BertConfig(vocab_size=9, **sizes)))
assert hf_adanorm.is_patched(BertModel(model.config))
assert hf_adanorm.modeling_adanorm.KERNELS["adanorm"]
"""
SCRIPTS = {"PEFT later": PEFT_LATER, "no thread": NO_THREAD}
SCRIPTS |= {what: LAZY.replace("{first}", first) for what, first in FIRST.items()}
# Each script runs in a fork that has imported neither transformers nor hf_adanorm. The parent has imported what takes
# most of the time and plays no part.
FORKS = """
import json, os, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor, pandas, pyarrow, bitsandbytes
assert not {"hf_adanorm", "transformers", "peft"} & set(sys.modules)
failed = {}
for name, code in json.load(sys.stdin).items():
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-10_000:])
            os._exit(1)
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    failed[name] = said if os.wait()[1] else ""
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def failed() -> dict[str, str]:
    """Return how each script failed, or "" for success."""
    given = json.dumps(SCRIPTS)
    done = subprocess.run([sys.executable, "-c", FORKS], input=given, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_import_alone_brings_nothing_heavy() -> None:
    code = 'import sys, hf_adanorm; assert not {"torch", "transformers", "peft", "numpy"} & set(sys.modules)'
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("what", FIRST)
def test_whatever_is_imported_first_the_hooks_are_there(failed: dict[str, str], what: str) -> None:
    assert not failed[what]


def test_peft_imported_later_is_wrapped_then(failed: dict[str, str]) -> None:
    assert not failed["PEFT later"]


def test_importing_starts_no_thread_and_opens_no_connection(failed: dict[str, str]) -> None:
    assert not failed["no thread"]
