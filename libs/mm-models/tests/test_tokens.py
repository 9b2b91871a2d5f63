"""The head of a language model, and predicting the next token: the numbers of full logits, without making them."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mm_models.layers import core
from mm_models.tokens import IGNORED, NextToken, greedy, token_losses
from mm_parallel.estimate.peak import PeakMemory
from mm_parallel.step import forward_backward

VOCABULARY = 37


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def labels(*shape, share=0.5):
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(0, VOCABULARY, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < share, found, IGNORED)


def full(x, weight, labels):
    """What it must equal: all logits, and torch's cross entropy."""
    return F.cross_entropy((x @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def gradients(losses, x, weight, labels, **options):
    """(losses, gradients of their sum with weights that differ) of x and weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    found = losses(x, weight, labels, **options)
    upstream = torch.arange(1.0, labels.numel() + 1).view(labels.shape)
    (found * upstream).sum().backward()
    return found.detach(), x.grad, weight.grad


@pytest.mark.parametrize("chunk", [(2048, 16384), (3, 5), (1, VOCABULARY), (100, 1)])
def test_equals_full_logits(chunk):
    x, weight, wanted = drawn(2, 9, 8), drawn(VOCABULARY, 8, seed=1), labels(2, 9)
    for ours, theirs in zip(
        gradients(token_losses, x, weight, wanted, chunk=chunk), gradients(full, x, weight, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    assert torch.equal(token_losses(x, weight, wanted)[wanted == IGNORED], torch.zeros((wanted == IGNORED).sum()))


def test_large_logits_do_not_overflow():
    x, weight = 200 * drawn(1, 6, 8), drawn(VOCABULARY, 8, seed=1)
    wanted = labels(1, 6, share=1.0)
    assert (x @ weight.T).abs().max() > 800  # exp of it is inf, also in float64
    for ours, theirs in zip(
        gradients(token_losses, x, weight, wanted, chunk=(2, 5)), gradients(full, x, weight, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [5, 0])
def test_without_labels_zero_and_a_graph(length):
    x, weight = drawn(1, length, 8).requires_grad_(), drawn(VOCABULARY, 8).requires_grad_()
    losses = token_losses(x, weight, torch.full((1, length), IGNORED))
    losses.sum().backward()
    assert torch.equal(losses, torch.zeros(1, length, dtype=torch.float64))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_what_is_not_a_number_stays_in_its_row():
    """Where there is a label it is told; elsewhere it does not reach the gradient of the head."""
    x, weight, wanted = drawn(1, 4, 8), drawn(VOCABULARY, 8, seed=1), torch.tensor([[3, IGNORED, 5, IGNORED]])
    x[0, 1] = math.nan
    losses, _, grad = gradients(token_losses, x, weight, wanted)
    assert losses.isfinite().all()
    assert grad.isfinite().all()
    x[0, 2] = math.nan
    losses, _, grad = gradients(token_losses, x, weight, wanted)
    assert losses[0, 0].isfinite()
    assert losses[0, 2].isnan()
    assert grad.isnan().all()
    assert torch.equal(losses.isnan(), full(x, weight, wanted).isnan())


def test_rounds_only_the_products():
    """Hidden states in bfloat16, float32 masters: losses and sums in float32, and no logit larger than it was."""
    x, weight, wanted = drawn(1, 300, 16, dtype=torch.bfloat16), drawn(VOCABULARY, 16, seed=1), labels(1, 300)
    losses, grad_x, grad_weight = gradients(token_losses, x, weight.float(), wanted, chunk=(7, 5))
    assert (losses.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    exact = gradients(full, x.double(), weight.bfloat16().double(), wanted)
    for ours, theirs, bound in zip((losses, grad_x, grad_weight), exact, (1e-2, 1e-2, 1e-2), strict=True):
        assert (ours.double() - theirs).norm() < bound * theirs.norm()


def test_frozen_weights_and_frozen_states_get_no_gradient():
    x, weight, wanted = drawn(1, 6, 8), drawn(VOCABULARY, 8, seed=1), labels(1, 6)
    token_losses(x, weight.requires_grad_(), wanted).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    weight = weight.detach()
    made = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t.shape) or t, lambda t: t):
        losses = token_losses(x.requires_grad_(), weight, wanted)
    losses.sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    assert sum(shape == weight.shape for shape in made) <= 1  # the weight itself; no gradient of its size waits


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_refuses_labels_out_of_range(label):
    with pytest.raises(
        ValueError, match=f"label {label} is no entry of a vocabulary of {VOCABULARY}: labels are 0 … 36"
    ):
        token_losses(drawn(1, 2, 8), drawn(VOCABULARY, 8), torch.tensor([[1, label]]))
    with pytest.raises(ValueError, match=r"hidden states \(1, 3, 8\).*labels \(1, 2\) do not fit"):
        token_losses(drawn(1, 3, 8), drawn(VOCABULARY, 8), torch.tensor([[1, 2]]))


def test_never_holds_the_logits():
    """512 tokens, a vocabulary of 8192: 16 MiB of logits in float32, and as much again for their gradient."""
    tokens, vocabulary, dim, chunk = 512, 8192, 16, (64, 512)
    x, weight = torch.randn(1, tokens, dim, requires_grad=True), torch.randn(vocabulary, dim, requires_grad=True)
    wanted = torch.randint(0, vocabulary, (1, tokens))
    logits, block, given = 4 * tokens * vocabulary, 4 * chunk[0] * chunk[1], 4 * dim * (tokens + vocabulary)

    def peak(losses, **options):
        x.grad = weight.grad = None
        with PeakMemory() as memory:
            losses(x, weight, wanted, **options).sum().backward()
        return memory.peak

    assert peak(full) > 2 * logits
    assert peak(token_losses, chunk=chunk) < 2 * given + 4 * block < logits / 10


# --- the objective

PACK = (0, 5, 12, 14)


class Words(nn.Module):
    """A language model: an embedding, one layer of attention, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8, dtype=torch.float64)
        self.mix = nn.Linear(8, 24, dtype=torch.float64)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = drawn(*parameter.shape, seed=i) / 2

    def forward(self, input_ids, position_ids, pixel_values=None, grid_thw=None, sequence=None, labels=None):
        place = position_ids.sum(0)[..., None].double()
        x = self.embed(input_ids) * (1 + place.cos())
        q, k, v = self.mix(x).unflatten(-1, (3, 1, 8)).unbind(2)
        x = x + core(q, k, v, sequence).flatten(2)
        return x @ self.embed.weight.T if labels is None else token_losses(x, self.embed.weight, labels)


def conversation(length, share, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
    wanted = torch.randint(0, VOCABULARY, (length,), generator=generator)
    wanted[torch.rand(length, generator=generator) >= share] = IGNORED
    return ids, wanted


CONVERSATIONS = [conversation(6, 0.8, 0), conversation(9, 0.2, 1), conversation(4, 0.0, 2), conversation(13, 0.9, 3)]


def pack(*conversations, padding=0):
    """As a data set packs them; behind them may be padding, which is no conversation."""
    bounds = torch.tensor([0, *(len(ids) for ids, _ in conversations)]).cumsum(0)
    if padding:
        conversations = (*conversations, (torch.full((padding,), 5), torch.full((padding,), IGNORED)))
    places = [torch.arange(len(ids)).expand(3, -1) for ids, _ in conversations]
    empty = torch.zeros(0, dtype=torch.long)
    return {
        "input_ids": torch.cat([empty, *(ids for ids, _ in conversations)])[None],
        "labels": torch.cat([empty, *(wanted for _, wanted in conversations)])[None],
        "position_ids": torch.cat([empty.expand(3, 0), *places], 1)[None],
        "segments": bounds[None],
        "pixel_values": torch.zeros(1, 0, 1176),
        "grid_thw": torch.zeros(1, 0, 3, dtype=torch.long),
    }


def train(objective, ranks):
    """One step of ranks x micro-batches x conversations; their mean gradient, as FSDP makes it, and the loss."""
    packs = [[one if isinstance(one, dict) else pack(*one) for one in rank] for rank in ranks]
    total = sum(float(objective.weigh(one).sum()) for rank in packs for one in rank)
    summed, loss = None, 0.0
    for rank in packs:
        model = Words()
        mesh_share = total / len(ranks)
        losses = forward_backward(
            model, len(rank), lambda i, rank=rank: objective.inputs(rank[i]),
            lambda output, i, rank=rank: objective.losses(output, rank[i]), mesh_share,
        )  # fmt: skip
        loss += sum(float(one.sum()) for one in losses) / total
        grads = [p.grad / len(ranks) for p in model.parameters()]
        summed = grads if summed is None else [a + b for a, b in zip(summed, grads, strict=True)]
    return loss, summed


def by_hand(average):
    """The loss of the step from all logits, conversation by conversation, and its gradients."""
    model, terms, counts = Words(), [], []
    for one in CONVERSATIONS:
        given = NextToken().inputs(pack(one))
        wanted = given.pop("labels")
        terms.append(F.cross_entropy(model(**given)[0], wanted[0], reduction="sum"))
        counts.append(int((wanted != IGNORED).sum()))
    means = [term / max(count, 1) for term, count in zip(terms, counts, strict=True)]
    loss = {
        "token": sum(terms) / sum(counts),
        "micro_batch": sum(means) / len(means),
        "sample": sum(means) / sum(count > 0 for count in counts),
    }[average]
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("average", ["token", "micro_batch", "sample"])
def test_a_step_is_the_same_however_it_is_cut(average):
    """One rank and two, micro-batches of one conversation and of several, and an empty one."""
    a, b, c, d = CONVERSATIONS
    wanted, grads = by_hand(average)
    layouts = {
        "1 x 4": [[[a], [b], [c], [d]]],
        "2 x 2": [[[a], [b]], [[c], [d]]],
        "2 x 1, packed": [[[a, b]], [[c, d]]],
        "1 x 2, packed otherwise": [[[d, c, b], [a]]],
        "2 x 2, one pack empty": [[[a, d], [b]], [[c], []]],
        "1 x 3, padded to one length": [[pack(a, b, padding=4), pack(c, padding=15), pack(d, padding=6)]],
        "2 x 1, padding alone": [[pack(a, b, c, d)], [pack(padding=32)]],
    }
    for name, ranks in layouts.items():
        loss, found = train(NextToken(average), ranks)
        assert loss == pytest.approx(wanted, rel=1e-9), name
        for ours, theirs in zip(found, grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_averages_differ():
    """Or the test above would compare one with itself."""
    assert len({round(by_hand(average)[0], 6) for average in ("token", "micro_batch", "sample")}) == 3


def test_weighs_conversations():
    tensors = pack(*CONVERSATIONS)
    counts = [int((wanted != IGNORED).sum()) for _, wanted in CONVERSATIONS]
    assert counts[2] == 0
    assert NextToken().weigh(tensors).tolist() == counts
    assert NextToken("micro_batch").weigh(tensors).tolist() == [1, 1, 1, 1]
    assert NextToken("sample").weigh(tensors).tolist() == [1, 1, 0, 1]
    assert NextToken().weigh(pack()).tolist() == []


def test_inputs_are_the_models_arguments():
    given = NextToken().inputs(pack(*CONVERSATIONS[:2]))
    assert given["position_ids"].shape == (3, 1, 15)
    assert given["sequence"] == (15, True, (0, 6, 15))
    assert given["pixel_values"].shape == (0, 1176)
    assert given["grid_thw"] == ()
    assert NextToken().inputs(pack(CONVERSATIONS[0]))["sequence"] == (6, True, None)
    assert NextToken().inputs(pack())["sequence"] == (0, True, None)
    assert NextToken().inputs(pack(CONVERSATIONS[0], padding=3))["sequence"] == (9, True, (0, 6, 9))
    assert NextToken().inputs(pack(padding=3))["sequence"] == (3, True, None)


# --- answers


def prompt(length, seed):
    ids, _ = conversation(length, 0, seed)
    return SimpleNamespace(
        input_ids=ids,
        position_ids=torch.arange(length).expand(3, -1) * 2,  # as after an image: not simply counted
        pixel_values=torch.zeros(0, 1176),
        grid_thw=torch.zeros(0, 3, dtype=torch.long),
    )


def answer_alone(model, question, tokens, stop):
    """One question by itself, its positions by the rule: the largest there is, plus one."""
    ids, places, answer = question.input_ids.tolist(), question.position_ids.tolist(), []
    while len(answer) < tokens:
        given = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor(places)[:, None]}
        token = int(
            model(**given, sequence=NextToken().inputs(pack((torch.tensor(ids),) * 2))["sequence"])[0, -1].argmax()
        )
        if token in stop:
            return answer
        answer.append(token)
        ids.append(token)
        places = [[*row, max(map(max, places)) + 1] for row in places]
    return answer


def test_greedy_answers_several_questions_at_once():
    model, questions = Words(), [prompt(4, 1), prompt(9, 2), prompt(2, 5), prompt(6, 7)]
    free = [answer_alone(model, question, 6, ()) for question in questions]
    stop = {free[1][2]}  # ends the second answer after two tokens, at the latest
    wanted = [answer_alone(model, question, 6, stop) for question in questions]
    assert len({len(answer) for answer in wanted}) > 1, "the answers must end at different places"
    calls = []

    def counting(**given):
        calls.append(given["sequence"])
        return model(**given)

    assert greedy(counting, questions, 6, stop) == wanted
    assert len(calls) == min(6, max(map(len, wanted)) + 1)
    banned = {token for answer in free for token in answer}
    others = greedy(model, questions, 6, (), banned_ids=banned)
    assert all(len(answer) == 6 and not banned & set(answer) for answer in others)
    assert greedy(model, questions, 0, stop) == [[], [], [], []]
    assert greedy(model, [], 5, stop) == []
