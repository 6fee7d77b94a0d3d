"""The file that travels with saved models uses public names only, and survives what the stock model survives."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from transformers import BertConfig, BertModel

from hf_adanorm import modeling_adanorm, patch_model
from tests.zoo.processes import Scripts

TRAVELER = Path(modeling_adanorm.__file__)
CONVENTIONS = {"_is_hf_initialized", "_auto_class", "_keys_to_ignore_on_load_unexpected"}  # may vanish without harm


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_it_uses_no_private_name_of_torch_or_transformers() -> None:
    tree = ast.parse(TRAVELER.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and private(node.attr)}
    assert attributes - own <= CONVENTIONS
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {text for text in texts if private(text) and text.isidentifier() and text != "_"} <= {
        *CONVENTIONS,
        *(modeling_adanorm.ADDED_BIAS, modeling_adanorm.ADJUSTED_EPS),
    }
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [part for node in imported for part in [*(node.module or "").split("."), *(a.name for a in node.names)]]
    assert not [name for name in names if private(name)]


# Each name is deleted in a child of a process that has loaded torch and transformers, and not the package.
DELETE = """
import importlib, json, os, sys
import torch, transformers
from transformers import AutoModel
import transformers.conversion_mapping as mapping
stock, ours, out = sys.argv[1:]
AutoModel.from_pretrained(stock)

def work(folder, trust, to):
    model = AutoModel.from_pretrained(folder, trust_remote_code=trust).train()
    model(torch.arange(8)[None])[0].square().sum().backward()
    model.save_pretrained(to)

def without_keyword(*args, **kwargs):
    if kwargs:
        raise TypeError("unexpected keyword argument")
    return []

NAMES = {
    "torch._C": "_len_torch_dispatch_stack _is_tracing _functorch",
    "torch._C._functorch": "unwrap_if_dead is_legacy_batchedtensor",
    "torch.autograd.forward_ad": "_current_level",
    "torch.fx": "Proxy",
    "torch": "native_layer_norm",
    "torch.nn.modules.conv": "_ConvNd",
    "torch.nn.modules.batchnorm": "_NormBase",
    "torch.nn": "CrossMapLRN2d",
    "torch.nn.Module": "_register_state_dict_hook _register_load_state_dict_pre_hook _load_from_state_dict",
    "transformers.conversion_mapping": "get_model_conversion_mapping",
    "transformers.PreTrainedModel": "_initialize_weights _auto_class",
}
results = {}
cases = [(home, name) for home, names in NAMES.items() for name in names.split()] + [("mapping", "add_legacy")]
for home, name in cases:
    for kind, folder in (("stock", stock), ("ours", ours)):
        child = os.fork()
        if child == 0:
            try:
                if home == "mapping":
                    mapping.get_model_conversion_mapping = without_keyword
                else:
                    parts = home.split(".")
                    owner = importlib.import_module(parts[0])
                    for part in parts[1:]:
                        owner = getattr(owner, part)
                    delattr(owner, name)
                work(folder, kind == "ours", os.path.join(out, f"{name}-{kind}"))
                os._exit(0)
            except BaseException as error:
                print(f"{home}.{name} {kind}: {type(error).__name__}: {error}", file=sys.stderr)
                os._exit(1)
        results[f"{home}.{name} {kind}"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(json.dumps(results))
"""


def test_whatever_name_disappears_it_survives_if_the_stock_model_does(tmp_path: Path, elsewhere: Scripts) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    model.save_pretrained(tmp_path / "stock")
    patch_model(model).save_pretrained(tmp_path / "ours")
    done = elsewhere.run_code(DELETE, *(tmp_path / name for name in ("stock", "ours", "out")))
    results = json.loads(done.stdout.splitlines()[-1])
    stock = {name.removesuffix(" stock") for name, fine in results.items() if name.endswith(" stock") and fine}
    ours = {name.removesuffix(" ours") for name, fine in results.items() if name.endswith(" ours") and fine}
    assert len(stock) >= 8
    assert stock <= ours, done.stderr[-2000:]


ELSEWHERE = """
import sys
del sys.modules["hf_adanorm"]  # it can be imported
import torch
from transformers import AutoModel
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
print(type(model).__module__, "hf_adanorm" in sys.modules)
"""


def test_a_folder_called_hf_adanorm_in_the_working_directory_is_not_imported(
    tmp_path: Path, elsewhere: Scripts
) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    patch_model(BertModel(BertConfig(vocab_size=9, **sizes))).save_pretrained(tmp_path / "saved")
    (tmp_path / "hf_adanorm").mkdir()
    (tmp_path / "hf_adanorm" / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    module, imported = elsewhere.run_code(ELSEWHERE, tmp_path / "saved", folder=tmp_path).stdout.split()[-2:]
    assert module.startswith("transformers_modules.")
    assert imported == "False"
