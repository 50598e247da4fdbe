"""The fused head against the slow loop, at its edges, and in what it holds in memory."""

import math
import shutil
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.rl.entropy import TokenStatistics, clamped_entropy, fused_logprob_entropy
from shared.rl.smallest import SAMPLE_STRIDE, exact_cut, narrowed, sampled_band
from shared.rl.softmax_sums import (
    LONG_ROW,
    LogitRows,
    RunningSums,
    padded,
    removed_sums,
    tiles,
)
from shared.rl.tile_work import InPlaceWork

CLAMP_P = 0.33
LONG = LONG_ROW + 75
"""A vocabulary whose threshold is looked for by a sample; no multiple of anything."""


def make_inputs(
    num_tokens: int, vocabulary: int, *, width: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + vocabulary)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def gradients(outputs: TokenStatistics, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a sum with other weights for each token and statistic."""
    there = [each for each in outputs if each is not None and each.requires_grad]
    weights = torch.randn(len(there), len(there[0]), generator=torch.Generator().manual_seed(1))
    total = sum((row * each).sum() for row, each in zip(weights, there, strict=True))
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, inputs[:2])


def naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, clamp_p: float | None
) -> TokenStatistics:
    """With all logits at once, by autograd."""
    logits = hidden @ weight.T / temperature
    log_probs = logits.log_softmax(-1)
    logprob = log_probs[torch.arange(len(targets)), targets]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    if clamp_p is None:
        return TokenStatistics(logprob, entropy, None, None)
    return TokenStatistics(logprob, entropy, *clamped_entropy(logits, clamp_p=clamp_p))


class Loop:
    """Statistics and gradient of one token, in plain numpy loops."""

    def __init__(self, logits: np.ndarray[Any, Any], target: int, num_removed: int) -> None:
        order = sorted(range(len(logits)), key=lambda v: (logits[v], v))
        self.kept = sorted(order[num_removed:])
        self.p = self._softmax(logits, range(len(logits)))
        self.q = self._softmax(logits, self.kept)
        self.target = target

    @staticmethod
    def _softmax(logits: np.ndarray[Any, Any], among: Any) -> np.ndarray[Any, Any]:
        probs = np.zeros(len(logits))
        highest = max(logits[v] for v in among)
        for v in among:
            probs[v] = math.exp(logits[v] - highest)
        normalised: np.ndarray[Any, Any] = probs / probs.sum()
        return normalised

    @staticmethod
    def entropy(probs: np.ndarray[Any, Any]) -> float:
        return -sum(float(p) * math.log(p) for p in probs if p > 0)

    def slope(self, probs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Of the entropy, by each logit."""
        entropy = self.entropy(probs)
        return np.array([-p * (math.log(p) + entropy) if p > 0 else 0.0 for p in probs])

    def values(self) -> list[float]:
        entropy = self.entropy(self.p)
        removed = sum(self.p[v] for v in range(len(self.p)) if v not in self.kept)
        pull = sum(p * p * (math.log(p) + entropy) for p in self.p if p > 0)
        logprob = math.log(self.p[self.target])
        return [logprob, entropy, self.entropy(self.q), removed, pull]

    def slopes(self) -> np.ndarray[Any, Any]:
        one_hot = np.zeros(len(self.p))
        one_hot[self.target] = 1
        return np.stack([one_hot - self.p, self.slope(self.p), self.slope(self.q)])


@pytest.mark.parametrize(
    ("temperature", "chunk", "is_tied"),
    [*product((1.0, 0.7), (1, 2, 3, 4, 5, 9), (False,)), (1.0, 2, True), (0.5, 5, True)],
)
def test_values_and_gradients_equal_the_slow_loop(
    temperature: float, chunk: int, is_tied: bool
) -> None:
    hidden, weight, targets = make_inputs(5, 23)
    if is_tied:
        hidden = hidden.detach().round().requires_grad_()
        weight = weight.detach().round().requires_grad_()
    clamp_p = 0.4
    outputs = fused_logprob_entropy(
        hidden,
        weight,
        targets,
        temperature=temperature,
        clamp_p=clamp_p,
        chunk=chunk,
        with_mean_pull=True,
    )
    logits = (hidden @ weight.T / temperature).detach().numpy()
    loops = [Loop(logits[t], int(targets[t]), int(23 * clamp_p)) for t in range(5)]
    if is_tied:
        assert any(len(set(row)) < len(row) for row in logits.tolist())
    for place, ours in enumerate(outputs):
        assert ours is not None
        assert ours.tolist() == pytest.approx([loop.values()[place] for loop in loops], abs=1e-12)
    for place, ours in enumerate(outputs[:3]):
        assert ours is not None
        slopes = np.stack([loop.slopes()[place] for loop in loops]) / temperature
        grads = torch.autograd.grad(ours.sum(), (hidden, weight), retain_graph=True)
        np.testing.assert_allclose(grads[0], slopes @ weight.detach().numpy(), atol=1e-12)
        np.testing.assert_allclose(grads[1], slopes.T @ hidden.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("chunk", [2, 5])
def test_every_choice_of_outputs_passes_gradcheck(which: tuple[int, ...], chunk: int) -> None:
    hidden, weight, targets = make_inputs(5, 11, width=3)

    def chosen(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        outputs = fused_logprob_entropy(
            hidden, weight, targets, temperature=1.3, clamp_p=CLAMP_P, chunk=chunk
        )
        return tuple(
            each for place, each in enumerate(outputs) if place in which and each is not None
        )

    assert torch.autograd.gradcheck(chosen, (hidden, weight))


@pytest.mark.parametrize(
    ("num_tokens", "chunk", "clamp_p"),
    [*((5, 2, clamp_p) for clamp_p in (None, 0.0, 0.1, CLAMP_P, 0.9)), (75, 64, CLAMP_P)],
)
def test_a_long_vocabulary_is_cut_exactly(
    num_tokens: int, chunk: int, clamp_p: float | None
) -> None:
    """With many tokens in several tiles, too."""
    assert (len(tiles(chunk, LONG, torch.device("cpu"))) > 1) == (chunk > 5)
    inputs = make_inputs(num_tokens, LONG)
    arguments: dict[str, Any] = {"temperature": 0.8, "clamp_p": clamp_p}
    fused = fused_logprob_entropy(*inputs, **arguments, chunk=chunk)
    expected = naive(*inputs, **arguments)
    for ours, theirs in zip(fused, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    for ours, theirs in zip(gradients(fused, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def scattered(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, LONG, generator=generator) * torch.arange(1, 10).unsqueeze(-1)


ROWS: dict[str, Callable[[], Tensor]] = {
    "scattered": lambda: scattered(2),
    "on a grid": lambda: (scattered(3) * 4).round(),
    "on a coarse grid": lambda: (scattered(3) / 4).round(),
    "equal": lambda: torch.ones(2, LONG),
    "ascending and descending": lambda: torch.stack(
        [torch.linspace(-3, 3, LONG), torch.linspace(3, -3, LONG)]
    ),
    # The sample has one column in so many: here it has none of the low ones.
    "against the sample": lambda: (torch.arange(LONG) % SAMPLE_STRIDE == 0) * 2 + scattered(4) / 99,
    "with heavy tails": lambda: scattered(5) ** 5,
    "some like no other": lambda: torch.cat([scattered(6), torch.ones(2, LONG), scattered(7)]),
    "padded": lambda: scattered(8).masked_fill(torch.arange(LONG) > LONG / 2, -torch.inf),
}


def as_logit_rows(rows: Tensor) -> LogitRows:
    values = rows.new_full((len(rows), padded(LONG)), torch.inf)
    values[:, :LONG] = rows
    blocks = [slice(first, min(first + 640, LONG)) for first in range(0, LONG, 640)]
    return LogitRows(values, LONG, rows.amax(-1, keepdim=True), blocks)


@pytest.mark.parametrize("share", [1 / LONG, 0.01, CLAMP_P, 0.99, 1 - 2 / LONG])
@pytest.mark.parametrize("name", ROWS)
def test_exactly_the_smallest_are_removed_of_equals_the_first(name: str, share: float) -> None:
    rows = ROWS[name]()
    num_removed = round(LONG * share)
    work = InPlaceWork(rows.new_empty(0), len(rows) * 640)
    removed, cut = removed_sums(as_logit_rows(rows), num_removed, work)
    expected = torch.zeros_like(rows, dtype=torch.bool)
    expected.scatter_(-1, rows.sort(stable=True).indices[:, :num_removed], True)
    assert torch.equal(cut.removed(rows), expected)
    exps = (rows - rows.amax(-1, keepdim=True)).double().exp()
    torch.testing.assert_close(
        removed[0].squeeze(-1), (exps * expected).sum(-1), rtol=1e-5, atol=1e-30
    )


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("width", [LONG, 640, 7])
@pytest.mark.parametrize("name", ROWS)
def test_running_sums_are_those_of_the_whole_row(name: str, width: int, order: int) -> None:
    rows = ROWS[name]()
    work = InPlaceWork(rows.new_empty(0), rows.numel())
    sums = RunningSums(rows[:, :1], with_squares=True)
    for tile in torch.split(rows, width, dim=-1)[::order]:
        sums.add(tile, work)
    assert torch.equal(sums.peak, rows.amax(-1, keepdim=True))
    x = (rows - sums.peak).double().clamp(min=-1e4)
    for ours, theirs in (
        (sums.total, x.exp()),
        (sums.centred, x.exp() * x),
        (sums.squares, (2 * x).exp()),
        (sums.centred_squares, (2 * x).exp() * x),
    ):
        torch.testing.assert_close(ours, theirs.sum(-1, keepdim=True), rtol=1e-5, atol=1e-30)


def test_running_sums_of_a_row_that_is_not_finite_are_not() -> None:
    tiles_of = [torch.ones(2, 8), torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.ones(2, 8)]
    sums = RunningSums(torch.zeros(2, 1), with_squares=False)
    for tile in tiles_of:
        sums.add(tile, InPlaceWork(torch.empty(0), 16))
    assert sums.total.isnan().tolist() == [[True], [False]]


def test_the_band_holds_the_cut_of_ordinary_rows() -> None:
    """Else every row would be selected slowly, and still correctly."""
    rows = torch.cat([scattered(seed) for seed in range(10, 20)])
    count = int(LONG * CLAMP_P)
    wide = sampled_band(rows[:, ::SAMPLE_STRIDE].contiguous(), CLAMP_P)
    ends = [(rows < end).sum(-1, keepdim=True).float() for end in wide]
    band = narrowed(wide, ends[0], ends[1], count)
    below, below_high = ((rows < end).sum(-1) for end in band)
    assert ((below <= count) & (count <= below_high)).float().mean() > 0.97
    assert (below_high - below).float().mean() < 0.05 * LONG


@pytest.mark.parametrize("vocabulary", [40, LONG])
def test_the_gradient_of_removed_logits_is_exactly_zero(vocabulary: int) -> None:
    _, weight, _ = make_inputs(1, vocabulary, dtype=torch.float32)
    hidden = torch.randn(1, 6, generator=torch.Generator().manual_seed(6)).repeat(3, 1)
    outputs = fused_logprob_entropy(
        hidden,
        weight,
        torch.zeros(3, dtype=torch.int64),
        temperature=1.0,
        clamp_p=CLAMP_P,
        chunk=2,
    )
    assert outputs.clamped_entropy is not None
    (grad,) = torch.autograd.grad(outputs.clamped_entropy.sum(), weight)
    order = (hidden[:1] @ weight.T).squeeze(0).sort(stable=True).indices
    num_removed = int(vocabulary * CLAMP_P)
    assert (grad[order[:num_removed]] == 0).all()
    assert (grad[order[num_removed:]] != 0).any(-1).all()


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The number of entries of the largest tensor that any operation makes."""

    def __init__(self, *, but: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = 0
        self._but = but

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() != self._but:
                self.size = max(self.size, each.untyped_storage().nbytes() // each.element_size())
        return made


@pytest.mark.parametrize("clamp_p", [None, CLAMP_P])
def test_no_tensor_is_larger_than_a_chunk_of_logits(clamp_p: float | None) -> None:
    num_tokens, chunk = 24, 4
    inputs = make_inputs(num_tokens, LONG, dtype=torch.float32, width=3)
    with LargestTensor(but=LONG * 3 * 4) as largest:
        outputs = fused_logprob_entropy(
            *inputs, temperature=0.7, clamp_p=clamp_p, chunk=chunk, with_mean_pull=True
        )
        gradients(outputs, inputs)
    assert chunk * LONG <= largest.size <= chunk * padded(LONG)


def test_a_pass_that_only_measures_holds_a_tile_of_logits_and_no_chunk() -> None:
    num_tokens = chunk = 64
    inputs = make_inputs(num_tokens, LONG, dtype=torch.float32, width=3)
    with LargestTensor(but=LONG * 3 * 4) as largest, torch.no_grad():
        fused_logprob_entropy(*inputs, temperature=0.7, chunk=chunk, with_mean_pull=True)
    tile = tiles(chunk, LONG, torch.device("cpu"))[0]
    assert tile.stop < LONG
    assert largest.size == num_tokens * tile.stop


def test_one_chunk_is_kept_for_the_backward_pass_and_nothing_else_of_that_size() -> None:
    inputs = make_inputs(24, 500, dtype=torch.float32)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fused_logprob_entropy(*inputs, temperature=1.0, clamp_p=CLAMP_P, chunk=4)
    weight, kept, *others = sorted(sizes, reverse=True)
    assert (weight, kept) == (500 * 6, 4 * padded(500))
    assert max(others) == 24 * 6


def test_the_backward_pass_can_be_repeated() -> None:
    inputs = make_inputs(7, 30)
    outputs = fused_logprob_entropy(*inputs, temperature=0.9, clamp_p=CLAMP_P, chunk=3)
    total = outputs.logprob.sum() + outputs.entropy.sum()
    first = torch.autograd.grad(total, inputs[:2], retain_graph=True)
    second = torch.autograd.grad(total, inputs[:2])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_tied_weight_gathers_the_gradients_of_both_its_uses() -> None:
    _, embedding, targets = make_inputs(5, 12)
    inputs = torch.tensor([3, 1, 4, 1, 5])

    def loss(read: Tensor, head: Tensor, *, fused: bool) -> Tensor:
        hidden = torch.tanh(read[inputs])
        arguments: dict[str, Any] = {"temperature": 1.0, "clamp_p": CLAMP_P}
        if fused:
            outputs = fused_logprob_entropy(hidden, head, targets, chunk=2, **arguments)
        else:
            outputs = naive(hidden, head, targets, **arguments)
        assert outputs.clamped_entropy is not None
        return outputs.logprob.sum() + 0.3 * outputs.clamped_entropy.sum()

    for _ in range(2):
        torch.autograd.backward(loss(embedding, embedding, fused=True))
    read, head = (embedding.detach().clone().requires_grad_() for _ in range(2))
    torch.autograd.backward(2 * loss(read, head, fused=False))
    assert embedding.grad is not None and read.grad is not None and head.grad is not None
    torch.testing.assert_close(embedding.grad, read.grad + head.grad)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen: str) -> None:
    hidden, weight, targets = make_inputs(5, 20)
    both = torch.autograd.grad(
        fused_logprob_entropy(hidden, weight, targets, temperature=1.0, chunk=2).logprob.sum(),
        (hidden, weight),
    )
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    outputs = fused_logprob_entropy(hidden, weight, targets, temperature=1.0, chunk=2)
    torch.autograd.backward(outputs.logprob.sum())
    for tensor, expected in zip((hidden, weight), both, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, expected)
        else:
            assert tensor.grad is None


def test_single_precision_is_as_near_to_double_as_its_logits_are() -> None:
    inputs = make_inputs(12, LONG, dtype=torch.float32, width=32)
    wide = tuple(each.detach().double() if each.is_floating_point() else each for each in inputs)
    wide = tuple(each.requires_grad_() if each.is_floating_point() else each for each in wide)
    arguments: dict[str, Any] = {"temperature": 1.0, "clamp_p": CLAMP_P, "chunk": 5}
    single = fused_logprob_entropy(*inputs, **arguments, with_mean_pull=True)
    double = fused_logprob_entropy(wide[0], wide[1], wide[2], **arguments, with_mean_pull=True)
    for ours, theirs in zip(single, double, strict=True):
        assert ours is not None and theirs is not None
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(gradients(single, inputs), gradients(double, wide), strict=True):
        assert (ours - theirs).norm() < 2e-5 * theirs.norm()


@pytest.mark.parametrize("vocabulary", [300, LONG])
def test_bfloat16_weights_have_float32_statistics_and_sums_of_gradients(vocabulary: int) -> None:
    inputs = make_inputs(16, vocabulary, dtype=torch.bfloat16, width=16)
    arguments: dict[str, Any] = {"temperature": 1.0, "clamp_p": CLAMP_P}
    fused = fused_logprob_entropy(*inputs, **arguments, chunk=3)
    rounded = (inputs[0] @ inputs[1].T).detach().double()
    expected = clamped_entropy(rounded, clamp_p=CLAMP_P)
    for ours, theirs in zip((fused.clamped_entropy, fused.removed_mass), expected, strict=True):
        assert ours is not None and ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    hidden, weight = (each.detach().double().requires_grad_() for each in inputs[:2])
    exact = gradients(naive(hidden, weight, inputs[2], **arguments), (hidden, weight))
    for mine, theirs, given in zip(gradients(fused, inputs), exact, inputs[:2], strict=True):
        assert mine.dtype == given.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 0.04 * theirs.norm()


def test_a_float32_product_spares_bfloat16_weights_the_rounding_of_their_logits() -> None:
    inputs = make_inputs(16, 300, dtype=torch.bfloat16, width=64)
    wide = (inputs[0].detach().double().requires_grad_(), inputs[1].detach().double())
    wide[1].requires_grad_()
    exact = naive(*wide, inputs[2], temperature=1.0, clamp_p=None)
    exact_grads = gradients(exact, wide)
    errors, grad_errors = [], []
    for product_dtype in (None, torch.float32):
        outputs = fused_logprob_entropy(
            *inputs, temperature=1.0, chunk=5, product_dtype=product_dtype
        )
        errors.append((outputs.logprob - exact.logprob).abs().max().item())
        grads = gradients(outputs, inputs)
        assert [each.dtype for each in grads] == [torch.bfloat16, torch.bfloat16]
        pairs = zip(grads, exact_grads, strict=True)
        grad_errors.append([float((a - b).norm() / b.norm()) for a, b in pairs])
    assert errors[1] < 1e-4 < 1e-2 < errors[0]
    # What is left is the rounding of the sum itself, 2^-9 at most.
    assert max(grad_errors[1]) < 2e-3 < 6e-3 < min(grad_errors[0])


@pytest.mark.parametrize("vocabulary", [9, LONG])
@pytest.mark.parametrize("clamp_p", [None, CLAMP_P])
def test_impossible_tokens_are_finite_and_without_gradient(
    vocabulary: int, clamp_p: float | None
) -> None:
    """A weight of -inf for a hidden state above 0, as padding of the vocabulary may have it."""
    hidden = torch.full((3, 1), 2.0)
    weight = torch.randn(vocabulary, 1, generator=torch.Generator().manual_seed(7))
    weight[-4:] = -torch.inf
    weight.requires_grad_()
    outputs = fused_logprob_entropy(
        hidden,
        weight,
        torch.zeros(3, dtype=torch.int64),
        temperature=1.0,
        clamp_p=clamp_p,
        chunk=2,
        with_mean_pull=True,
    )
    assert all(each is None or bool(each.isfinite().all()) for each in outputs)
    shorter = naive(
        hidden, weight[:-4], torch.zeros(3, dtype=torch.int64), temperature=1.0, clamp_p=None
    )
    torch.testing.assert_close(outputs.entropy, shorter.entropy)
    (grad,) = gradients_of_weight(outputs, weight)
    assert grad.isfinite().all()
    assert (grad[-4:] == 0).all()


def gradients_of_weight(outputs: TokenStatistics, weight: Tensor) -> tuple[Tensor, ...]:
    there = [each.sum() for each in outputs if each is not None and each.requires_grad]
    return torch.autograd.grad(torch.stack(there).sum(), weight)


@pytest.mark.parametrize("shift", [800.0, -800.0, 1e5])
def test_logits_far_from_zero_and_from_each_other_stay_finite(shift: float) -> None:
    hidden = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 800.0]], requires_grad=True)
    weight = torch.tensor([[shift, 0.0], [shift, 1.0], [shift, -1.0], [shift, 2.0]])
    outputs = fused_logprob_entropy(
        hidden,
        weight,
        torch.tensor([0, 1, 2]),
        temperature=1.0,
        clamp_p=CLAMP_P,
        chunk=2,
    )
    logits = torch.tensor([[0.0, 1, -1, 2], [0, 0, 0, 0], [0, 800, -800, 1600]])
    expected = logits.log_softmax(-1)[torch.arange(3), torch.tensor([0, 1, 2])]
    torch.testing.assert_close(outputs.logprob, expected)
    assert outputs.entropy[2] == 0
    (grad,) = torch.autograd.grad(outputs.logprob.sum() + outputs.entropy.sum(), hidden)
    assert grad.isfinite().all()


@pytest.mark.parametrize("vocabulary", [30, LONG])
def test_a_token_that_is_nan_spoils_itself_alone(vocabulary: int) -> None:
    hidden, weight, targets = make_inputs(4, vocabulary)
    broken = hidden.detach().clone()
    broken[2] = torch.nan
    arguments: dict[str, Any] = {"temperature": 1.0, "clamp_p": CLAMP_P, "chunk": 3}
    outputs = fused_logprob_entropy(broken.requires_grad_(), weight, targets, **arguments)
    whole = fused_logprob_entropy(hidden, weight, targets, **arguments)
    for ours, theirs in zip(outputs[:4], whole[:4], strict=True):
        assert ours is not None and theirs is not None
        assert ours.isnan().tolist() == [False, False, True, False]
        assert torch.equal(ours[[0, 1, 3]], theirs[[0, 1, 3]])
    (grad,) = torch.autograd.grad(outputs.logprob.sum(), broken)
    assert grad.isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("slope", [0.0, math.nan])
def test_a_slope_of_zero_or_nan_reaches_both_inputs(slope: float) -> None:
    inputs = make_inputs(5, 20)
    outputs = fused_logprob_entropy(*inputs, temperature=1.0, clamp_p=CLAMP_P, chunk=2)
    assert outputs.clamped_entropy is not None
    total = (outputs.logprob.sum() + outputs.clamped_entropy.sum()) * slope
    for grad in torch.autograd.grad(total, inputs[:2]):
        assert (grad == 0).all() if slope == 0 else grad.isnan().all()


@pytest.mark.parametrize("vocabulary", [30, LONG])
def test_without_tokens_the_gradients_are_zero(vocabulary: int) -> None:
    hidden, weight, targets = make_inputs(4, vocabulary)
    outputs = fused_logprob_entropy(
        hidden[:0], weight, targets[:0], temperature=1.0, clamp_p=CLAMP_P, chunk=3
    )
    grads = torch.autograd.grad(outputs.logprob.sum() + outputs.entropy.sum(), (hidden, weight))
    assert [grad.shape for grad in grads] == [hidden.shape, weight.shape]
    assert all((grad == 0).all() for grad in grads)


def test_a_second_gradient_is_refused() -> None:
    inputs = make_inputs(3, 10)
    outputs = fused_logprob_entropy(*inputs, temperature=1.0, chunk=2)
    (grad,) = torch.autograd.grad(outputs.entropy.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(grad.sum(), inputs[0])


def test_the_exact_cut_takes_the_first_of_equals() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0, 5.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert exact_cut(rows, 2).removed(rows).tolist() == [
        [False, True, True, False, False],
        [True, True, False, False, False],
    ]
    assert not exact_cut(rows, 0).removed(rows).any()


def both_ways(
    dtype: torch.dtype, clamp_p: float | None, width: int
) -> list[tuple[TokenStatistics, list[Tensor]]]:
    """Statistics and gradients, in place and by the functions that are compiled."""
    made = []
    for is_compiled in (False, True):
        inputs = make_inputs(11, LONG, dtype=dtype, width=width)
        statistics = fused_logprob_entropy(
            *inputs,
            temperature=0.7,
            clamp_p=clamp_p,
            chunk=4,
            with_mean_pull=True,
            is_compiled=is_compiled,
        )
        made.append((statistics, list(gradients(statistics, inputs))))
    return made


def assert_alike(made: list[tuple[TokenStatistics, list[Tensor]]], tolerance: float) -> None:
    (statistics, grads), (compiled, compiled_grads) = made
    for ours, theirs in zip((*statistics, *grads), (*compiled, *compiled_grads), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("clamp_p", [None, CLAMP_P])
def test_what_is_compiled_computes_what_is_done_in_place(clamp_p: float | None) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert_alike(both_ways(torch.float64, clamp_p, 6), 1e-10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++ on a CPU")
@pytest.mark.parametrize("clamp_p", [None, CLAMP_P])
def test_what_is_compiled_indeed_computes_the_same(clamp_p: float | None) -> None:
    assert_alike(both_ways(torch.float32, clamp_p, 6), 2e-4)
