"""What each part gains that is not written the plain way: forward and backward beside what PyTorch offers for the same.

One process, one thread, the same numbers into both; what comes out is compared before anything is timed. The best round
of each stands, rounds in turn, so that a slow minute meets both. Batches and widths are those of MOSI: 32 sequences of
up to 500 steps of 20 numbers, lengths drawn evenly.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import Row, Table, record
from benchmarks.render import measured, table, wanted
from benchmarks.systems import seconds
from mmsa_dist.layers.attention import attend
from mmsa_dist.layers.packed import Steps
from mmsa_dist.layers.ragged import make_ragged, ragged_states
from mmsa_dist.layers.recurrent import BiGRU, BiLSTM, LastStateLSTM
from mmsa_dist.layers.sight import Sight
from mmsa_dist.layers.tiles import attend_packed, attend_padded
from mmsa_dist.worker import take_cores

SAMPLES, STEPS, WIDTH, HIDDEN = 32, 500, 20, 16


@dataclass(frozen=True)
class Part:
    """Two ways to the same: each call runs forward and backward, or a step, and gives what must agree."""

    what: str
    plain: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    same: bool = True
    """False where each way draws its own random numbers."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=7, help="counted rounds of each, after two (default: %(default)s)"
    )
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    take_cores(1)
    torch.manual_seed(1)
    how = f"best of {options.rounds} after 2"
    rows: list[Row] = []
    times: list[list[str]] = []
    for make in (bidirectional, last_state, small_numbers, attention_dropout, encoder, projections, optimizer):
        for part in make():
            plain, ours = compare(part, options.rounds)
            rows.append(Row(f"{part.what}: gain", plain / ours, "x", how=how))
            times.append([part.what, f"{1e3 * plain:,.1f}", f"{1e3 * ours:,.1f}"])
            print(f"{part.what}: {plain / ours:.2f} x", flush=True)
    print(table(["", "measured", "wanted", "how"], [[r.what, measured(vars(r)), wanted(vars(r)), r.how] for r in rows]))
    if not options.no_record:
        record(
            "parts", rows, tables=[Table("CPU time of a round", ["part / plain way", "plain, ms", "ours, ms"], times)]
        )


def compare(part: Part, rounds: int) -> tuple[float, float]:
    """CPU seconds of the plain way and of ours.

    Raises:
        AssertionError: they do not give the same.
    """
    if part.same:
        torch.testing.assert_close(part.ours(), part.plain(), rtol=1e-3, atol=1e-4, msg=part.what)
    best = [float("inf")] * 2
    for i in range(rounds + 2):
        for way, call in enumerate((part.plain, part.ours)):
            taken = seconds(call)
            if i >= 2:
                best[way] = min(best[way], taken)
    return best[0], best[1]


# --- the parts --------------------------------------------------------------------------------------------------------


def bidirectional() -> list[Part]:
    values, lengths = sequences()
    real = (torch.arange(values.shape[1]) < lengths[:, None])[..., None]

    def part(name: str, layer: BiGRU | BiLSTM) -> Part:
        return Part(
            f"bidirectional {name} / packed",
            trained(lambda: layer.packed(values, lengths) * real, layer, values),
            trained(lambda: layer.unpacked(values, lengths) * real, layer, values),
        )

    return [part("GRU", BiGRU(WIDTH, HIDDEN)), part("LSTM", BiLSTM(WIDTH, HIDDEN))]


def last_state() -> list[Part]:
    values, lengths = sequences()
    layer = LastStateLSTM(WIDTH, HIDDEN)
    return [
        Part(
            "LSTM's last state / packed",
            trained(lambda: layer.packed(values, lengths), layer, values),
            trained(lambda: layer(values, lengths), layer, values),
        )
    ]


def small_numbers() -> list[Part]:
    """Below 1e-38, where the gradient of a sequence's first steps ends: ranks take them for nothing."""
    values, lengths = sequences()
    layer = LastStateLSTM(WIDTH, HIDDEN)
    step = trained(lambda: layer(values, lengths), layer, values)

    def plain() -> Tensor:
        torch.set_flush_denormal(False)
        try:
            return step()
        finally:
            torch.set_flush_denormal(True)

    return [Part("LSTM's last state, nothing below 1e-38 / all numbers", plain, step)]


def attention_dropout() -> list[Part]:
    """MulT's attention: 10 heads of 4 over 500 steps."""
    values, lengths = sequences(samples=8, width=40)
    steps = Steps.of(lengths, torch.ones(len(lengths), dtype=torch.bool))
    packed = steps.pack(values.detach()).requires_grad_()
    sight = Sight(steps, steps)
    return [
        Part(
            f"attention, dropout {dropout} / scaled_dot_product_attention",
            trained(partial(attend_padded, packed, packed, packed, sight, 10, dropout), None, packed),
            trained(partial(attend_packed, packed, packed, packed, sight, 10, dropout), None, packed),
            same=not dropout,
        )
        for dropout in (0.0, 0.2)
    ]


def encoder() -> list[Part]:
    """Four layers as wide as BERT-base over transcripts of 8 to 50 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=4, vocab_size=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain, ours = BertModel(config, add_pooling_layer=False), BertModel(config, add_pooling_layer=False)
    ours.load_state_dict(plain.state_dict())
    make_ragged(ours)
    lengths = torch.randint(8, 51, (16,))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(1000, mask.shape)

    def padded() -> Tensor:
        return plain(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]

    return [
        Part(
            "text encoder of 4 layers without padding / padded to the longest",
            trained(padded, plain, None),
            trained(lambda: ragged_states(ours, ids, mask), ours, None),
        )
    ]


def projections() -> list[Part]:
    """UFEN's self-attention over 500 steps: three projections of one input, or one of all three."""
    values, lengths = sequences(width=32)
    mask = torch.arange(values.shape[1]) < lengths[:, None]
    three = [nn.Linear(32, 32, bias=False) for _ in range(3)]
    one = nn.Linear(32, 96, bias=False)
    one.weight.data.copy_(torch.cat([layer.weight for layer in three]))

    def attention(*parts: Tensor) -> Tensor:
        query, key, value = (part[:, None] for part in parts)
        return attend(query, key, value, mask)[:, 0] * mask[..., None]

    return [
        Part(
            "self-attention by three projections / by one",
            trained(lambda: attention(*one(values).chunk(3, -1)), None, values),
            trained(lambda: attention(*(layer(values) for layer in three)), None, values),
        )
    ]


def optimizer() -> list[Part]:
    """One step of Adam over all parameters in one flat tensor, as ZeRO keeps them: MiniLM's number, and BERT-base's."""
    return [
        Part(
            f"step of Adam, {millions} M numbers, fused / {rival}",
            stepping(millions * 10**6, foreach=rival == "foreach"),
            stepping(millions * 10**6, fused=True),
        )
        for millions, rival in ((22, "foreach"), (22, "one by one"), (110, "foreach"))
    ]


# --- what they share --------------------------------------------------------------------------------------------------


def sequences(samples: int = SAMPLES, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Values (B, T, D) that want a gradient, and lengths (B,); one of them full."""
    lengths = torch.randint(50, STEPS + 1, (samples,))
    lengths[0] = STEPS
    return torch.randn(samples, STEPS, width).requires_grad_(), lengths


def trained(forward: Callable[[], Tensor], layer: nn.Module | None, values: Tensor | None) -> Callable[[], Tensor]:
    """Forward and backward, as training does; gives the output beside the gradient of `values`, else of all weights."""

    def both() -> Tensor:
        if layer is not None:
            layer.zero_grad(set_to_none=True)
        if values is not None:
            values.grad = None
        out = forward()
        out.square().mean().backward()
        if values is None:
            assert layer is not None
            gradient = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
        else:
            assert values.grad is not None
            gradient = values.grad.flatten()
        return torch.cat([out.detach().flatten(), F.normalize(gradient, dim=0)])

    return both


def stepping(numbers: int, foreach: bool | None = None, fused: bool | None = None) -> Callable[[], Tensor]:
    """A step of Adam; gives the first thousand numbers."""
    generator = torch.Generator().manual_seed(1)
    weights = nn.Parameter(torch.randn(numbers, generator=generator))
    weights.grad = torch.randn(numbers, generator=generator)
    adam = torch.optim.Adam([weights], lr=1e-3, foreach=foreach, fused=fused)

    def step() -> Tensor:
        adam.step()
        return weights.detach()[:1000].clone()

    return step


if __name__ == "__main__":
    main()
