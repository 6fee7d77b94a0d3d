"""recipes/launch/two_nodes.yaml on two hosts, made of network namespaces: they meet over a cable of their own.

    sudo python tests/campaigns/two_nodes.py            about five minutes; Linux, root, iproute2; gloo on CPUs

- Two nodes of one process end with the weights of one node with two processes.
- A node is killed in the middle: the other ends, and the same command on both goes on to the same weights.
- A node that never comes is said so within the time given.
- One process that raises ends the others within seconds, with its message.
- DeepSpeed's ZeRO-2 and ZeRO-3 on its CPU accelerator, where it is installed: losses as without it, a model to reload.

Ends with code 1 and the reasons when one of these does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import torch  # noqa: E402
from transformers import BertForMaskedLM  # noqa: E402

from hf_adanorm import is_patched  # noqa: E402
from tests.campaigns.gpu_check import Place, bert  # noqa: E402
from tests.recipes.fault_runs import STEPS, arguments, write_data  # noqa: E402
from tests.recipes.recipe_process import check_whole, resumed_from, same_weights  # noqa: E402

FIRST = "10.77.0.1"
LAST = f"checkpoint-{STEPS}"
LIMIT = 400  # seconds that a run may take; nothing here is left running for longer
SOON = 60  # seconds in which the others must end
GIVEN = 20  # seconds in which a node has to come
# A process that is sent this signal raises, as any fault in its code would.
RAISES = """
import signal
def fail(*_):
    raise RuntimeError("the tokens have run out")
signal.signal(signal.SIGUSR1, fail)
"""


class Hosts:
    """Two network namespaces with one cable between them, which end with the block, and all that runs in them."""

    def __init__(self) -> None:
        self.names = [f"adanorm-{os.getpid()}-{rank}" for rank in range(2)]

    def __enter__(self) -> Hosts:
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self.names
        _ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for rank, name in enumerate(self.names):
            _ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for rank, name in enumerate(self.names):
            self.kill(rank)
            subprocess.run(["ip", "netns", "del", name], check=False)

    def processes(self, rank: int) -> list[int]:
        """All that run on this host."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[rank]], capture_output=True, text=True, check=False)
        return [int(line) for line in listed.stdout.split()]

    def kill(self, rank: int) -> None:
        for process in self.processes(rank):
            os.kill(process, signal.SIGKILL)

    def start(self, rank: int, command: Sequence[object], log: Path, path: str = "") -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable", "PYTHONPATH": paths}
        with log.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[rank], *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
            )


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True)


def node(rank: int, *more: object, options: Sequence[object] = ()) -> list[object]:
    """The command that recipes/launch/two_nodes.yaml tells to start on a node; one process each, in full precision."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/launch/two_nodes.yaml"]
    numbers = ["--num_processes", 2, "--machine_rank", rank, "--main_process_ip", FIRST, "--mixed_precision", "no"]
    return [*launcher, *numbers, *options, "recipes/classification.py", *more]


def finish(process: subprocess.Popen[bytes], log: Path, seconds: float = LIMIT) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds} s:\n{log.read_text()[-1500:]}") from None


class Campaign:
    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.data = folder / "data"
        self.data.mkdir()
        write_data(self.data)

    def logs(self, name: str) -> list[Path]:
        return [self.folder / f"{name}-{rank}.log" for rank in range(2)]

    def start_both(
        self, name: str, output_dir: Path, paths: Sequence[str] = ("", "")
    ) -> list[subprocess.Popen[bytes]]:
        run = arguments("classification", self.data, output_dir)
        logs = self.logs(name)
        return [self.hosts.start(rank, node(rank, *run), logs[rank], paths[rank]) for rank in range(2)]

    def both(self, name: str, output_dir: Path) -> None:
        """Both nodes to the end of the run."""
        for process, log in zip(self.start_both(name, output_dir), self.logs(name), strict=True):
            assert finish(process, log) == 0, log.read_text()[-3000:]

    def wait_for(self, path: Path, processes: Sequence[subprocess.Popen[bytes]], name: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not path.exists():
            assert time.monotonic() < deadline, f"no {path.name} after {LIMIT} s"
            for process, log in zip(processes, self.logs(name), strict=True):
                assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)

    def one_node(self) -> str:
        log = self.logs("one")[0]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2]
        run = arguments("classification", self.data, self.folder / "one")
        process = self.hosts.start(0, [*launcher, "recipes/classification.py", *run], log)
        assert finish(process, log) == 0, log.read_text()[-3000:]
        return ""

    def two_nodes(self) -> str:
        self.both("two", self.folder / "two")
        assert same_weights(self.folder / "one" / LAST, self.folder / "two" / LAST)
        return "the weights of one node with two processes, bit for bit"

    def a_node_is_killed(self) -> str:
        run = self.folder / "killed"
        processes = self.start_both("killed", run)
        self.wait_for(run / "checkpoint-8", processes, "killed")
        self.hosts.kill(1)
        began = time.monotonic()
        log = self.logs("killed")[0]
        assert finish(processes[0], log, SOON) != 0
        ended = time.monotonic() - began
        processes[1].wait()
        check_whole(run)
        self.both("resumed", run)
        step = resumed_from(self.logs("resumed")[0])
        assert step >= 8
        assert same_weights(self.folder / "one" / LAST, run / LAST)
        return f"the other ended after {ended:.0f} s; both went on from step {step} to the same weights"

    def a_node_never_comes(self) -> str:
        said = []
        for rank in range(2):
            log = self.logs("alone")[rank]
            run = arguments("classification", self.data, self.folder / "alone")
            began = time.monotonic()
            options = ["--rdzv_conf", f"timeout={GIVEN}"]
            process = self.hosts.start(rank, node(rank, *run, options=options), log)
            assert finish(process, log, GIVEN + SOON) != 0
            ended = time.monotonic() - began
            text = log.read_text()
            reasons = [line for line in text.splitlines() if "timed out" in line.lower() or "timeout" in line.lower()]
            assert reasons, text[-3000:]
            said.append(f"node {rank} alone, after {ended:.0f} s: {reasons[-1].strip()[-120:]}")
        return "; ".join(said)

    def one_process_raises(self) -> str:
        for alone in range(2):
            name = f"raises-{alone}"
            path = self.folder / name
            path.mkdir()
            (path / "sitecustomize.py").write_text(RAISES)
            run = self.folder / f"{name}-run"
            paths = [str(path) if rank == alone else "" for rank in range(2)]
            processes = self.start_both(name, run, paths)
            self.wait_for(run / "checkpoint-8", processes, name)
            began = time.monotonic()
            os.kill(max(self.hosts.processes(alone)), signal.SIGUSR1)  # the newest is the recipe
            logs = self.logs(name)
            for process, log in zip(processes, logs, strict=True):
                assert finish(process, log, SOON) != 0
            ended = time.monotonic() - began
            for log in logs:
                assert "the tokens have run out" in log.read_text(), log.read_text()[-3000:]
        return f"both ended after {ended:.0f} s, and both say why"

    def deepspeed(self) -> str:
        if importlib.util.find_spec("deepspeed") is None:
            return "left out: deepspeed is not installed"
        found = {}
        for stage in (0, 2, 3):
            folder, log = self.folder / f"zero{stage}", self.folder / f"zero{stage}.log"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2 if stage else 1]
            process = self.hosts.start(0, [*launcher, __file__, "--train", folder, "--stage", stage], log, str(ROOT))
            assert finish(process, log) == 0, log.read_text()[-3000:]
            found[stage] = json.loads((folder / "losses.json").read_text())
            assert is_patched(BertForMaskedLM.from_pretrained(folder)), stage
        assert found[0][-1] < found[0][0], found
        furthest = max(abs(a - b) for each in found.values() for a, b in zip(each, found[0], strict=True))
        assert furthest < 1e-3, found
        return f"ZeRO-2 and ZeRO-3 over two processes: losses within {furthest:.1e} of one process"


def train(folder: Path, stage: int) -> None:
    """A patched model under DeepSpeed itself, each process with its half of the batch: on CPUs accelerate takes the
    processes that DeepSpeed divides a model over for so many single runs. Stage 0: without DeepSpeed."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model, batch = bert(Place(torch.device("cpu"), folder), hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    part = {name: rows.chunk(count)[rank] for name, rows in batch.items()}
    engine: Any = model
    if stage:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    losses = []
    for _ in range(10):
        loss = engine(**part).loss
        if stage:
            engine.backward(loss)
            engine.step()
            torch.distributed.all_reduce(loss := loss.detach() / count)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        (folder / "losses.json").write_text(json.dumps(losses))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.stage)
        return 0
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory() as folder, Hosts() as hosts:
        campaign = Campaign(hosts, Path(folder))
        parts: tuple[Callable[[], str], ...] = (
            campaign.one_node,
            campaign.two_nodes,
            campaign.a_node_is_killed,
            campaign.a_node_never_comes,
            campaign.one_process_raises,
            campaign.deepspeed,
        )
        for part in parts:
            began = time.monotonic()
            try:
                verdict, said = "ok", part()
            except Exception:
                verdict, said = "FAILED", traceback.format_exc()
                failed += 1
            print(
                f"{verdict:6}  {part.__name__.replace('_', ' '):20}  {time.monotonic() - began:4.0f} s  {said}",
                flush=True,
            )
            for rank in range(2):
                hosts.kill(rank)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
