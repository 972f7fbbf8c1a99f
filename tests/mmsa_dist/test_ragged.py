"""The encoder without padding says what the padded one says, its gradients included, and computes less."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from mmsa_dist.layers.ragged import Places, make_ragged, ragged_states

LENGTHS = [7, 1, 3, 12, 2]
MASK = torch.arange(12) < torch.tensor(LENGTHS)[:, None]


def bert(**options: float) -> BertModel:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=50, **small, **options), add_pooling_layer=False)


def some_ids() -> Tensor:
    return torch.randint(1, 50, (5, 12), generator=torch.Generator().manual_seed(1)) * MASK


def test_states_and_gradients_are_those_of_the_padded_batch() -> None:
    plain, model = bert().eval(), bert().eval()
    assert make_ragged(model)
    wanted = plain(input_ids=some_ids(), attention_mask=MASK).last_hidden_state * MASK[..., None]
    states = ragged_states(model, some_ids(), MASK)
    torch.testing.assert_close(states, wanted, atol=1e-6, rtol=0)
    assert not states[~MASK].any()
    weight = torch.randn(16, generator=torch.Generator().manual_seed(2))
    for one in (wanted, states):
        (one @ weight).tanh().sum().backward()
    for (name, of_plain), (_, of_ragged) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(of_ragged.grad, of_plain.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_an_ordinary_padded_call_is_still_one() -> None:
    """As on a GPU: the same model, with padding and a mask."""
    plain, model = bert().eval(), bert().eval()
    make_ragged(model)
    with torch.no_grad():
        wanted, found = (one(input_ids=some_ids(), attention_mask=MASK).last_hidden_state for one in (plain, model))
    torch.testing.assert_close(found[MASK], wanted[MASK], atol=1e-6, rtol=0)


def test_what_stands_in_padding_is_not_read() -> None:
    model = bert().eval()
    make_ragged(model)
    with torch.no_grad():
        before, after = (ragged_states(model, ids, MASK) for ids in (some_ids(), some_ids() + 9 * ~MASK))
    assert torch.equal(before, after)


def test_attention_drops_in_training_only() -> None:
    model = bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    make_ragged(model)
    with torch.no_grad():
        one, other = (ragged_states(model.train(), some_ids(), MASK) for _ in range(2))
        still = [ragged_states(model.eval(), some_ids(), MASK) for _ in range(2)]
    assert not torch.equal(one, other)
    assert torch.equal(*still)


def test_only_real_tokens_are_computed() -> None:
    model = bert().eval()
    make_ragged(model)
    flops = []
    for mask in (MASK, torch.ones_like(MASK)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ragged_states(model, some_ids(), mask)
        linear = counter.get_flop_counts()["Global"]
        flops.append(sum(n for operation, n in linear.items() if "addmm" in str(operation)))
    assert flops[0] / flops[1] == sum(LENGTHS) / MASK.numel()


def test_other_architectures_are_left_alone() -> None:
    model = DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16))
    before = model.config._attn_implementation
    assert not make_ragged(model)
    assert model.config._attn_implementation == before


def test_places_go_there_and_back() -> None:
    places, tokens = Places(MASK), torch.arange(1, 26).float()
    assert torch.equal(places.gather(places.spread(tokens)), tokens)
    assert places.steps.tolist() == [step for length in LENGTHS for step in range(length)]
