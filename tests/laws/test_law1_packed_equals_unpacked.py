"""Law 1: per-token loss and gradients of a row equal those of its samples alone; one document changes no
other."""

import pytest
import torch

from repsft_fast.data.plan import Plan
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.models import load_model
from tests.helpers import tiny

LENGTHS = (5, 17, 1, 9, 9, 30)  # shorter and longer than Olmo3's window, equal ones, a single position


def build(name, dtype=torch.float64, **options):
    torch.manual_seed(1)
    return load_model(tiny.config(name), param_dtype=dtype, **options)


def losses(model, samples, **options):
    row = tiny.row(samples, prompt=1, **options)
    _, stats = model.loss(row)
    return [stats.loss[row.position_segments == i] for i in range(len(samples))]


def losses_of(model, sample):
    return model.loss(tiny.row([sample]))[1].loss


def gradients(model, rows):
    model.zero_grad(set_to_none=True)
    for row in rows:
        model.loss(row)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_errors(got, expected):
    assert got.keys() == expected.keys()
    return {name: ((got[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected}


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("attention", ["sdpa", "mask"])
@pytest.mark.parametrize("length", [None, 80])
def test_losses_and_gradients_equal_those_of_the_samples_alone(name, attention, length):
    model = build(name, attention=attention)
    samples = tiny.documents(LENGTHS)
    with torch.no_grad():
        packed = losses(model, samples, length=length)
        for i, sample in enumerate(samples):
            torch.testing.assert_close(packed[i], losses(model, [sample])[0], rtol=1e-12, atol=1e-12)
    together = gradients(model, [tiny.row(samples, prompt=1, length=length)])
    alone = gradients(model, [tiny.row([sample], prompt=1) for sample in samples])
    errors = relative_errors(together, alone)
    assert max(errors.values()) < 1e-12, errors


# transformers' eager attention takes its softmax in fp32, whatever the model's type
@pytest.mark.parametrize(("attention", "bound"), [("sdpa", 1e-11), ("eager", 2e-6)])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_losses_equal_transformers_own_forward(name, attention, bound):
    """Not only equal to ourselves: the plain Hugging Face forward of one document, full logits."""
    from transformers import AutoModelForCausalLM

    model = build(name)
    plain = AutoModelForCausalLM.from_config(
        tiny.config(name), attn_implementation=attention, dtype=torch.float64
    )
    plain.load_state_dict(model.state_dict())
    samples = tiny.documents(LENGTHS)
    with torch.no_grad():
        packed = losses(model, samples)
        for loss, sample in zip(packed, samples, strict=True):
            ids = torch.tensor([sample])
            logits = plain(input_ids=ids[:, :-1], use_cache=False).logits[0]
            expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            torch.testing.assert_close(loss, expected[-len(loss) :], rtol=bound, atol=bound)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_perturbing_one_document_changes_no_other_bit_for_bit(name):
    model = build(name, torch.float32)
    samples = tiny.documents(LENGTHS)
    changed = list(samples)
    changed[1] = [(token - 3 + 1) % (tiny.VOCABULARY - 3) + 3 for token in samples[1]]
    with torch.no_grad():
        before, after = losses(model, samples, length=80), losses(model, changed, length=80)
    for i in range(len(samples)):
        assert torch.equal(before[i], after[i]) == (i != 1)


@pytest.mark.parametrize("name", ["llama", "olmo3"])
def test_rows_of_few_shapes_too(name):
    """A row closed at its most documents, another padded far beyond its samples: borders that stand for no
    document, a bound longer than every segment."""
    model = build(name)
    samples = tiny.documents(LENGTHS)
    store = TokenStore([Sample(ids, [False] + [True] * (len(ids) - 1)) for ids in samples], "cpu")
    shapes = RowLengths((16, 40, 90), documents=3, longest=30)
    plan = Plan(
        store.index, seed=0, row_tokens=90, bucket_tokens=1, batch_samples=len(LENGTHS), row_lengths=shapes
    )
    update = plan.epoch(0, 0)[0]
    assert len(update.ranks[0]) >= 2
    for planned in update.ranks[0]:
        row = store.row(planned, denominator=1.0, average="token")
        assert (row.tokens.shape[1] in shapes.lengths, row.cu_seqlens.numel()) == (True, 5)
        with torch.no_grad():
            _, stats = model.loss(row)
            for n, sample in enumerate(row.samples):
                alone = losses_of(model, samples[sample])
                got = stats.loss[row.position_segments == n]
                torch.testing.assert_close(got, alone, rtol=0, atol=3e-15)


@pytest.mark.parametrize("name", ["llama", "olmo3"])
def test_the_order_of_documents_in_the_row_does_not_matter(name):
    model = build(name)
    samples = tiny.documents(LENGTHS)
    forwards = gradients(model, [tiny.row(samples)])
    backwards = gradients(model, [tiny.row(samples[::-1])])
    assert max(relative_errors(backwards, forwards).values()) < 1e-12
