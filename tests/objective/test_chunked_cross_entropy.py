"""Cross-entropy in chunks equals that of whole logits, in loss and gradients, and never holds them."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megafusion.objective.config import LOGITS_ALIGNMENT
from megafusion.objective.head import LanguageHead
from megafusion.sequence.packing import target_index

WIDTH = 6


def chunks_of(num_chunks: int, num_tokens: int, bytes_per_logit: int):
    """A patch with which so many times 128 positions are a chunk."""
    columns = -(-num_tokens // LOGITS_ALIGNMENT) * LOGITS_ALIGNMENT
    size = num_chunks * LOGITS_ALIGNMENT * columns * bytes_per_logit
    return mock.patch("megafusion.objective.config.LOGITS_BYTES", size)


def labelled(num_positions: int, num_targets: int, num_tokens: int, seed: int) -> torch.Tensor:
    """Random labels [1, S], of which so many count."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((num_positions,), -100)
    chosen = torch.randperm(num_positions, generator=generator)[:num_targets]
    labels[chosen] = torch.randint(num_tokens, (num_targets,), generator=generator)
    return labels[None]


def whole(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> list[torch.Tensor]:
    """Loss and gradients of a mean by torch's own cross-entropy of all logits, in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    loss = (loss + z_loss * logits.logsumexp(-1)[labels.flatten() >= 0].square().sum()) / 7
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


def chunked(
    head: LanguageHead, hidden: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> list[torch.Tensor]:
    head.weight.grad, hidden = None, hidden.detach().requires_grad_()
    index = target_index(labels)
    loss = head(hidden, labels.flatten()[index], index, z_loss) / 7
    loss.backward()
    return [loss.detach(), hidden.grad, head.weight.grad]


def head_of(num_tokens: int, dtype: torch.dtype = torch.float32, spread: float = 1) -> LanguageHead:
    head = LanguageHead(WIDTH, num_tokens)
    head.weight.data = (spread * torch.randn(num_tokens, WIDTH, generator=torch.manual_seed(1))).to(dtype)
    return head


@given(
    st.sampled_from(
        [(130, n) for n in (0, 1, 127, 128, 129, 130)] + [(700, n) for n in (255, 257, 384, 700)]
    ),
    st.sampled_from([2, 127, 128, 129, 300]),
    st.integers(1, 3),
    st.floats(0.01, 10),
    st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_chunks_give_the_loss_and_the_gradients_of_whole_logits(layout, num_tokens, num_chunks, spread, seed):
    """Without a target, with one, with all, and at the borders of chunks; logits near 0 and of hundreds."""
    labels, head = labelled(*layout, num_tokens, seed), head_of(num_tokens, spread=spread)
    hidden = torch.randn(layout[0], WIDTH, generator=torch.manual_seed(seed))
    with chunks_of(num_chunks, num_tokens, 4):
        found = chunked(head, hidden, labels)
    # A float32 logit is rounded, and so is its exponential.
    rounding, number = 5e-7 * (1 + (hidden @ head.weight.T).abs().max().item()), max(1, layout[1])
    bounds = number, head.weight.abs().max().item(), number * hidden.abs().max().item()
    for ours, theirs, bound in zip(found, whole(hidden, head.weight, labels), bounds, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=rounding * bound / 7)


def test_z_loss_adds_the_squared_log_of_the_denominator_where_there_are_gradients():
    labels, head = labelled(300, 140, 200, 0), head_of(200)
    hidden = torch.randn(300, WIDTH, generator=torch.manual_seed(2))
    with chunks_of(1, 200, 4):
        found = chunked(head, hidden, labels, 0.3)
        index = target_index(labels)
        with torch.no_grad():
            nats = head(hidden, labels.flatten()[index], index, 0.3)
    for ours, theirs in zip(found, whole(hidden, head.weight, labels, 0.3), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    plain, *_ = whole(hidden, head.weight, labels)
    torch.testing.assert_close(nats.double() / 7, plain, rtol=1e-5, atol=0)
    assert found[0] > 1.5 * plain


def test_bf16_logits_have_float32_statistics():
    """As precise as float32 statistics of whole bf16 logits, whose gradients are rounded once."""
    labels, head = labelled(512, 400, 1000, 0), head_of(1000, torch.bfloat16)
    hidden = torch.randn(512, WIDTH).bfloat16()
    with chunks_of(1, 1000, 2):
        loss, *gradients = chunked(head, hidden, labels)
    logits = (hidden @ head.weight.T).float()
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum") / 7
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    _, *exact = whole(hidden, head.weight, labels)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() / theirs.norm() < 0.004


def test_a_frozen_head_has_no_gradient_and_hidden_states_have_theirs():
    labels, head = labelled(200, 60, 50, 0), head_of(50)
    hidden = torch.randn(200, WIDTH)
    expected = chunked(head, hidden, labels)[1]
    head.requires_grad_(False)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        _, found, weight_gradient = chunked(head, hidden, labels)
    assert head.weight.shape not in saved  # nor computed
    assert torch.equal(found, expected)
    assert weight_gradient is None
    index = target_index(labels)
    assert not head(hidden, labels.flatten()[index], index).requires_grad


def test_without_gradients_the_loss_is_the_same():
    labels, head = labelled(200, 60, 50, 0), head_of(50)
    hidden, index = torch.randn(200, WIDTH), target_index(labels)
    trained = head(hidden, labels.flatten()[index], index)
    with torch.no_grad():
        assert torch.equal(head(hidden, labels.flatten()[index], index), trained)


def test_a_tied_weight_adds_both_gradients():
    labels, head = labelled(200, 60, 50, 0), head_of(50)
    tokens = torch.randint(50, (200,))
    index = target_index(labels)
    head(F.embedding(tokens, head.weight), labels.flatten()[index], index).backward()
    weight = head.weight.detach().clone().requires_grad_()
    F.cross_entropy(F.embedding(tokens, weight) @ weight.T, labels.flatten(), reduction="sum").backward()
    torch.testing.assert_close(head.weight.grad, weight.grad, rtol=1e-5, atol=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=40, max_size=40), min_size=1, max_size=9))
def test_the_index_has_each_target_once_and_then_other_positions(rows):
    is_target = torch.tensor(rows)
    index = target_index(torch.where(is_target, 5, -100))
    number = int(is_target.sum())
    assert len(index) == min(is_target.numel(), max(1, -(-number // 128)) * 128)
    assert index[:number].tolist() == is_target.flatten().nonzero()[:, 0].tolist()
    assert len(index.unique()) == len(index)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_gpu_gives_the_same_without_waiting(is_compiled):
    """In bf16, with a vocabulary that is not aligned; several numbers of positions, as steps have them."""
    head = head_of(1002, torch.bfloat16).cuda()
    head.is_compiled = is_compiled
    for num_targets in (700, 300, 500):
        labels, hidden = labelled(1024, num_targets, 1002, 0), torch.randn(1024, WIDTH).bfloat16()
        index = target_index(labels)
        given = [x.cuda() for x in (hidden, labels.flatten()[index], index)]
        given[0].requires_grad_()
        head.weight.grad = None
        with chunks_of(2, 1002, 2):
            head(*given)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            (head(*given) / 7).backward()
            loss = head(*given) / 7
            torch.cuda.set_sync_debug_mode("default")
        found = [loss.detach(), given[0].grad, head.weight.grad]
        for ours, theirs in zip(found, whole(hidden, head.weight.cpu(), labels), strict=True):
            assert (ours.cpu() - theirs).norm() / theirs.norm() < 0.005


@pytest.mark.full
def test_compiled_passes_over_logits_give_the_same():
    labels, head = labelled(700, 500, 130, 0), head_of(130)
    hidden = torch.randn(700, WIDTH)
    with chunks_of(2, 130, 4):
        expected = chunked(head, hidden, labels)
        head.is_compiled = True
        for ours, theirs in zip(chunked(head, hidden, labels), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
