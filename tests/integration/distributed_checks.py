"""Run in two processes for `test_distributed.py`, which reads the results as JSON.

They are the losses of sharded and data-parallel training, beside those of one model on the same batch, the whole
state dict, and what accelerate's loader does.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import hf_adanorm
from tests.recipes.tiny_configs import TINY_TRANSLATOR

STEPS, ROWS, LENGTH, VOCAB = 4, 8, 6, 40
CONFIG = {**TINY_TRANSLATOR, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": VOCAB}
CONFIG |= {"dropout": 0.0, "attention_dropout": 0.0, "decoder_start_token_id": 2}
NORMS = {"adanorm": {"C": 1.3, "k": 0.07}, "detachnorm": {"detach_mean": False}}


def build(norm: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**CONFIG))
    return hf_adanorm.patch_model(model, norm, eps=1e-3, **NORMS[norm])


def batch(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    source = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=draw)
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": source.flip(1)}


def train(model: torch.nn.Module, rank: int | None) -> list[float]:
    """Return the mean loss over the global batch at every step. With a rank, train on this process's half."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        rows = batch(step)
        if rank is not None:
            rows = {name: tensor[rank::2].contiguous() for name, tensor in rows.items()}
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if rank is not None:
            dist.all_reduce(loss)
            loss = loss / 2
        losses.append(loss.item())
    return losses


def shard(model: torch.nn.Module, mesh: object) -> torch.nn.Module:
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_fsdp(norm: str, rank: int, mesh: object, folder: Path) -> dict[str, object]:
    whole, sharded = build(norm), shard(build(norm), mesh)
    found = {"whole": train(whole, None), "sharded": train(sharded, rank)}
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    register_fsdp_forward_method(sharded, "generate")
    inputs = batch(99)["input_ids"][:2]
    sharded.eval()
    found["generated"] = sharded.generate(inputs, num_beams=2, max_length=8, synced_gpus=True).tolist()
    if rank == 0:
        sharded.save_pretrained(folder / norm, state_dict=state)
        torch.save(whole.state_dict(), folder / f"{norm}.pt")
    return found


def check_accelerate_loader(rank: int, mesh: object) -> str:
    """Return what accelerate's RAM-efficient loading for FSDP2 raises on a patched model, or ""."""
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict

    full = build("adanorm").state_dict()
    sharded = shard(build("adanorm").to("meta"), mesh)
    accelerator = SimpleNamespace(is_main_process=rank == 0, device=torch.device("cpu"))
    try:
        fsdp2_load_full_state_dict(accelerator, sharded, full if rank == 0 else {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_ddp(norm: str, rank: int) -> dict[str, object]:
    whole, copy = build(norm), build(norm)
    return {"whole": train(whole, None), "parallel": train(DistributedDataParallel(copy), rank)}


def check(folder: Path) -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    found = {
        "processes": dist.get_world_size(),
        "fsdp": {norm: check_fsdp(norm, rank, mesh, folder) for norm in NORMS},
        "ddp": {norm: check_ddp(norm, rank) for norm in NORMS},
        "accelerate_loader": check_accelerate_loader(rank, mesh),
    }
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
