"""The fused head beside plain matrix products and the heads of others: time and memory.

    python -m tests.bench.fused_head --tokens 1024 --rounds 3

One output embedding [V, D], T tokens, forward and backward to hidden states and embedding. Each
form is timed right after the plain products (logits, and the two of their backward pass), on the
same tensors; the ratio of a pair is its time over theirs, and the median over the rounds is
reported. A form that computes its logits again in the backward pass makes a fourth product, ours
for all tokens but the last chunk's; so its time stands beside the plain products that it makes as
well, and what is above 1 there is what everything but the products costs. Times are CPU seconds of
one thread.

Memory is that of the process (its resident high-water mark) over what it held before the forward
pass, less the gradients themselves, each form in a process of its own.

The heads of others are installed by pip, without what they depend on, into a folder of their own
each; one that cannot be imported here has its reason in the table. Each does what it offers:
Liger's gives log-probs only, none has the clamped entropy.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shared.rl.entropy import clamped_entropy, entropy_from_logits, fused_logprob_entropy
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result

RESULT = RESULTS / "fused-head.json"
VOCABULARY = 151_936
CLAMP_P = 0.33
ENTROPY_COEFFICIENT = 0.01
PEERS = {
    # With what its head imports; all of its dependencies would bring another torch.
    "TRL": [
        *("trl", "accelerate", "datasets", "dill", "multiprocess", "pandas", "pyarrow"),
        *("python-dateutil", "pytz", "six", "tzdata", "xxhash"),
    ],
    "Liger": ["liger-kernel"],
    "verl": ["verl"],
}
MIB = 2**20

Outputs = Sequence[Tensor]
"""Log-probs, and entropies of any kind, [T] each."""


class Inputs(NamedTuple):
    """hidden [T, D] and weight [V, D] want gradients; targets [T]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


class Row(NamedTuple):
    """A line of the table; times in ns a logit.

    `ratio` is to the three plain products beside it, `ratio_to_own` to the `products` it makes.
    """

    form: str
    statistics: str
    products: float | None = None
    forward: float | None = None
    backward: float | None = None
    ratio: float | None = None
    ratio_to_own: float | None = None
    memory_mib: float | None = None
    absent: str = ""


def make_inputs(tokens: int, width: int, dtype: torch.dtype) -> Inputs:
    """Logits as wide as those of a trained model."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(VOCABULARY, width, generator=generator) * 3 / width**0.5
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets)


def ours(inputs: Inputs, chunk: int, clamp_p: float | None) -> Outputs:
    made = fused_logprob_entropy(*inputs, temperature=1.0, clamp_p=clamp_p, chunk=chunk)
    return [each for each in made[:3] if each is not None]


def naive(inputs: Inputs, clamp_p: float | None) -> Outputs:
    logits = (inputs.hidden @ inputs.weight.T).float()
    logprob = logits.log_softmax(-1).gather(-1, inputs.targets.unsqueeze(-1)).squeeze(-1)
    outputs = [logprob, entropy_from_logits(logits)]
    return outputs if clamp_p is None else [*outputs, clamped_entropy(logits, clamp_p=clamp_p)[0]]


def trl(inputs: Inputs) -> Outputs:
    head: Any = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    size = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    made = head.apply(
        inputs.hidden, inputs.weight, None, inputs.targets, 1.0, size, None, 1.0, ("entropy",)
    )
    return list(made[:2])


def liger(inputs: Inputs) -> Outputs:
    module: Any = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    head = module._ChunkedSelectiveLogProbFunction
    size = module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return [head.apply(inputs.hidden, inputs.weight, inputs.targets, None, 1.0, size)]


def verl(inputs: Inputs) -> Outputs:
    module: Any = importlib.import_module("torch_functional")
    return list(module.FusedLinearForPPO()(inputs.hidden, inputs.weight, inputs.targets))


def forms(chunk: int) -> dict[str, tuple[str, Callable[[Inputs], Outputs]]]:
    """By name: what it gives, and the forward pass."""
    both, all_three = "log-prob, entropy", "log-prob, entropy, clamped"
    return {
        "ours, log-prob": ("log-prob", lambda given: ours(given, chunk, None)[:1]),
        "ours": (both, lambda given: ours(given, chunk, None)),
        "ours, clamped": (all_three, lambda given: ours(given, chunk, CLAMP_P)),
        "naive": (both, lambda given: naive(given, None)),
        "naive, clamped": (all_three, lambda given: naive(given, CLAMP_P)),
        "TRL": (both, trl),
        "Liger": ("log-prob", liger),
        "verl": (both, verl),
    }


def products_of(form: str, tokens: int, chunk: int) -> float:
    """How many products of all tokens a form makes, forward and backward."""
    if form.startswith("naive"):
        return 3.0
    again = 1.0 if form in PEERS else max(0, tokens - chunk) / tokens
    return 3.0 + again


class Seconds(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def time_form(form: Callable[[Inputs], Outputs], inputs: Inputs) -> Seconds:
    start = time.process_time()
    logprob, *entropies = form(inputs)
    loss = logprob.sum() + sum(ENTROPY_COEFFICIENT * each.sum() for each in entropies)
    middle = time.process_time()
    torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return Seconds(middle - start, time.process_time() - middle)


def time_plain(inputs: Inputs) -> Seconds:
    """The three products and nothing else."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    start = time.process_time()
    logits = hidden @ weight.T
    middle = time.process_time()
    _ = logits @ weight, logits.T @ hidden
    return Seconds(middle - start, time.process_time() - middle)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text("utf8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_memory(form: Callable[[Inputs], Outputs], inputs: Inputs) -> float:
    """MiB beyond inputs and gradients, of a forward and backward pass."""
    small = Inputs(
        inputs.hidden.detach()[:8].clone().requires_grad_(),
        inputs.weight.detach()[:64].clone().requires_grad_(),
        inputs.targets[:8] % 64,
    )
    time_form(form, small)  # libraries are loaded at first use
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "utf8")  # resets the high-water mark
    time_form(form, inputs)
    gradients = sum(each.numel() * each.element_size() for each in inputs[:2])
    return (resident("VmHWM") - before - gradients) / MIB


def install(folder: Path) -> None:
    """The heads of others, into a folder each."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    for name, packages in PEERS.items():
        subprocess.run([*pip, str(folder / name), *packages], check=True)


def use(folder: Path) -> None:
    """Make what was installed importable."""
    # verl's own package imports Ray, so its one file is taken; and it would import the kernels of
    # Liger, which need Triton, if they were there.
    sys.path.append(str(folder / "verl" / "verl" / "utils" / "experimental"))
    with suppress(ImportError):
        importlib.import_module("torch_functional")
    sys.path += [str(folder / "TRL"), str(folder / "Liger")]


def reason_absent(name: str) -> str:
    """Why a form does not run here; empty if it does."""
    try:
        time_form(forms(1)[name][1], make_inputs(2, 8, torch.float32))
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def memory_in_child(name: str, given: argparse.Namespace, folder: Path) -> float:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.fused_head", "--memory-of", name]
    for option in ("tokens", "width", "chunk", "dtype"):
        command += [f"--{option}", str(getattr(given, option))]
    done = subprocess.run(
        [*command, "--peers", str(folder)], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(
    inputs: Inputs, names: Sequence[str], chunk: int, rounds: int, progress: Progressing
) -> dict[str, list[tuple[Seconds, Seconds]]]:
    """Pairs of a form and the plain products just before it."""
    pairs: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            plain = time_plain(inputs)
            pairs[name].append((time_form(forms(chunk)[name][1], inputs), plain))
            progress.advance(name)
    return pairs


def row(
    name: str,
    what: str,
    pairs: Sequence[tuple[Seconds, Seconds]],
    *,
    logits: int,
    products: float,
) -> Row:
    def nanoseconds(seconds: Sequence[float]) -> float:
        return round(statistics.median(seconds) / logits * 1e9, 2)

    return Row(
        form=name,
        statistics=what,
        products=round(products, 3),
        forward=nanoseconds([mine.forward for mine, _ in pairs]),
        backward=nanoseconds([mine.backward for mine, _ in pairs]),
        ratio=round(statistics.median(mine.total / plain.total for mine, plain in pairs), 3),
        # The further product is that of the forward pass.
        ratio_to_own=round(
            statistics.median(
                mine.total / (plain.total + (products - 3) * plain.forward) for mine, plain in pairs
            ),
            3,
        ),
    )


def run(given: argparse.Namespace, folder: Path, screen: Console) -> list[Row]:
    offered = {name: what for name, (what, _) in forms(given.chunk).items() if given.only in name}
    absent = {name: reason_absent(name) for name in offered if name in PEERS}
    names = [name for name in offered if not absent.get(name)]
    memory = {}
    with Progressing(screen, len(names) * (given.rounds + 1)) as progress:
        for name in names:
            memory[name] = round(memory_in_child(name, given, folder), 1)
            progress.advance(f"memory of {name}")
        inputs = make_inputs(given.tokens, given.width, getattr(torch, given.dtype))
        pairs = measure(inputs, names, given.chunk, given.rounds, progress)
    rows = [
        row(
            name,
            offered[name],
            pairs[name],
            logits=given.tokens * VOCABULARY,
            products=products_of(name, given.tokens, given.chunk),
        )._replace(memory_mib=memory[name])
        for name in names
    ]
    return rows + [Row(name, offered[name], absent=why) for name, why in absent.items() if why]


def table(rows: Sequence[Row], caption: str) -> Table:
    made = Table(title="An output embedding, forward and backward", caption=caption)
    for name in ("form", "statistics"):
        made.add_column(name)
    columns = ("forward", "backward", "over 3 products", "makes", "over those", "memory")
    for name in columns:
        made.add_column(name, justify="right")
    for each in rows:
        if each.absent:
            made.add_row(each.form, f"not run: {each.absent}", *[""] * len(columns))
            continue
        made.add_row(
            each.form,
            each.statistics,
            f"{each.forward} ns",
            f"{each.backward} ns",
            f"{each.ratio}x",
            f"{each.products} products",
            f"{each.ratio_to_own}x",
            f"{each.memory_mib} MiB",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="The fused head beside others.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=896, help="of the hidden states")
    parser.add_argument("--chunk", type=int, default=384, help="as learner.logit_chunk_tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="forms whose name holds this")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--peers", type=Path, help="where the heads of others are; else installed")
    parser.add_argument("--memory-of", help="only print the memory of this form, in MiB")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory_of:
        use(given.peers)
        inputs = make_inputs(given.tokens, given.width, getattr(torch, given.dtype))
        print(json.dumps(peak_memory(forms(given.chunk)[given.memory_of][1], inputs)))
        return
    options = "".join(
        f" --{name} {getattr(given, name)}"
        for name in ("tokens", "width", "chunk", "dtype", "rounds")
    )
    setting = Setting.of(f"tests.bench.fused_head{options}", packages=("torch",))
    screen = console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.peers or Path(scratch)
        if given.peers is None:
            install(folder)
        use(folder)
        heads = sorted(
            path.stem
            for name, (package, *_) in PEERS.items()
            for path in (folder / name).glob(f"{package.replace('-', '_')}-*.dist-info")
        )
        rows = run(given, folder, screen)
    screen.print(table(rows, str(setting)))
    write_result(given.result, setting, heads=heads, rows=[each._asdict() for each in rows])


if __name__ == "__main__":
    main()
