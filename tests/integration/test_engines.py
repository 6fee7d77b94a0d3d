"""Other engines load folded and swapped models. A test is skipped where its engine is not installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_adanorm import fold_affine, patch_model
from tests.zoo.fold_models import tied_llama
from tests.zoo.round_trip import build
from tests.zoo.tiny_text import make_tokenizer

IDS = torch.arange(4, 12)[None]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A LLaMA with trained gains and a tied head."""
    return tied_llama().eval()


@pytest.fixture(scope="module")
def folded(llama: PreTrainedModel) -> PreTrainedModel:
    model = tied_llama().eval()
    model.load_state_dict(llama.state_dict())
    assert fold_affine(model, tied="untie").is_stock
    return model


@torch.no_grad()
def log_probs(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits.log_softmax(-1)


class LogitsOnly(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


@pytest.mark.parametrize("how", ["folded", "swapped"])
def test_onnxruntime(llama: PreTrainedModel, folded: PreTrainedModel, how: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, expected = folded, log_probs(llama)
    if how == "swapped":
        model = patch_model(build("gpt2"), "adanorm")
        expected = log_probs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LogitsOnly(model).eval(), (IDS,), tmp_path / "model.onnx", dynamo=True, verbose=False, input_names=["ids"]
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"ids": IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits).log_softmax(-1), expected, rtol=1e-4, atol=1e-4)


def test_ctranslate2(llama: PreTrainedModel, folded: PreTrainedModel, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    folded.save_pretrained(tmp_path / "folded")
    tokenizer = make_tokenizer()
    words = [f"<{i}>" for i in range(folded.config.vocab_size - len(tokenizer))]
    tokenizer.add_tokens(words)
    tokenizer.add_special_tokens({"bos_token": words[0], "eos_token": words[1]})
    tokenizer.save_pretrained(tmp_path / "folded")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "folded")).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", intra_threads=1)
    tokens = tokenizer.convert_ids_to_tokens(IDS[0].tolist())
    (scored,) = generator.score_batch([tokens])
    expected = log_probs(llama)[0, :-1].gather(-1, IDS[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scored.log_probs), expected, rtol=1e-4, atol=1e-4)


def test_transformers_serve_answers_a_chat_with_a_swapped_model(tmp_path: Path) -> None:
    """`hf-adanorm run transformers serve FOLDER`, without trust_remote_code."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    patch_model(tied_llama(), "adanorm").save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "hf_adanorm.cli", "run", "transformers", "serve", str(tmp_path / "model")]
    command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        question = {"role": "user", "content": "the model has no gain"}
        body = {"model": str(tmp_path / "model"), "messages": [question], "max_tokens": 4, "stream": False}
        answer = _post("/v1/chat/completions", body, server, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(60)
    assert answer["choices"][0]["message"]["role"] == "assistant", answer
    assert answer["usage"]["completion_tokens"] > 0


def _post(path: str, body: dict[str, object], server: subprocess.Popen[bytes], log: Path) -> dict[str, object]:
    """Post as soon as the server has printed where it listens."""
    while not (found := re.search(r"running on (http://\S+:\d+)", log.read_text())):
        assert server.poll() is None, log.read_text()[-2000:]
        time.sleep(0.1)
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(found[1] + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.read().decode()[-1000:]}\n{log.read_text()[-3000:]}") from error
