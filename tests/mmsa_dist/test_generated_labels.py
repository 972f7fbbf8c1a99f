"""What holds for every label generator that makes labels: who takes part, restarts, ranks, and what a step costs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmsa_dist.errors import ConfigError
from mmsa_dist.label_generators import LabelGenerator, get_label_generator, make_generator
from mmsa_dist.systems import get_system, system_names
from mmsa_dist.systems.base import Prediction
from shards.batch import Batch
from shards.plan import Piece
from tests.mmsa_dist.batches import build, ragged, spec_for
from tests.mmsa_dist.label_references import MADE, LearnedRun, generator_of, take
from tests.mmsa_dist.ulgm_reference import same

Ranks = Callable[..., list[Any]]
State = dict[str, Tensor]

every_generator = pytest.mark.parametrize("name", MADE)
BY_SAMPLE = ("ids", "label", "feature", "class", "similarity")


def piece(numbers: list[int], weight: list[float] | None = None) -> Piece:
    weights = np.ones(len(numbers), np.float32) if weight is None else np.array(weight, np.float32)
    return Piece(np.array(numbers, dtype=np.int64), weights, float(weights.sum()))


def prepared(name: str, run: LearnedRun) -> Any:
    generator = generator_of(name, run)
    take(generator, run, range(1, 3))
    return generator


# --- who takes part


@every_generator
def test_a_sample_seen_twice_counts_once_and_filler_not_at_all(name: str) -> None:
    run = LearnedRun(samples=9, seed=2, global_batch=4)
    states = []
    for pieces in (
        [piece([3, 5])],
        [piece([3, 5, 7, 3], [1, 1, 0, 0])],
        [piece([3, 5]), piece([5, 3])],
        [piece([3, 5, 8, 8], [1, 1, 0, 0])],
    ):
        generator = prepared(name, run)
        generator.observe(3, *zip(*(run.step(3, p) for p in pieces), strict=True))
        states.append(generator.state_dict())
    assert all(same(states[0], state) for state in states[1:])


@every_generator
def test_an_absent_modality_takes_no_part(name: str) -> None:
    """Its features and what the layers said of them are NaN here: nothing of it may get anywhere."""
    run = LearnedRun(samples=12, seed=6, global_batch=4, absent=0.5)
    state = take(generator_of(name, run), run, range(1, 5))
    for task in "TAV":
        labels = get_label_generator(name).labels_in(state)[task].numpy()
        assert (labels[~run.present[task]] == run.truth[~run.present[task]]).all()
        assert (labels[run.present[task]] != run.truth[run.present[task]]).any()
    assert all(tensor.isfinite().all() for tensor in state.values())


@every_generator
def test_the_first_epoch_teaches_the_multimodal_label(name: str) -> None:
    run = LearnedRun(samples=9, seed=2, global_batch=4)
    generator = generator_of(name, run)
    for batches, predictions in run.steps(1):
        for batch, prediction in zip(batches, predictions, strict=True):
            targets = generator.targets(batch, prediction)
            assert all(torch.equal(target, batch.labels["M"]) for target in targets.values())
        generator.observe(1, batches, predictions)
    labels = get_label_generator(name).labels_in(generator.state_dict())
    assert all(np.array_equal(made.numpy(), run.truth) for made in labels.values())


# --- restarts


@every_generator
def test_a_restart_in_mid_epoch_is_invisible(name: str, tmp_path: Path) -> None:
    run = LearnedRun(samples=23, seed=5, global_batch=4, absent=0.2)
    generator = prepared(name, run)
    steps = list(run.steps(3))
    for seen in steps[:3]:
        generator.observe(3, *seen)
    save_file(generator.state_dict(), tmp_path / "labels.safetensors")
    resumed = generator_of(name, run)
    resumed.load_state_dict(load_file(tmp_path / "labels.safetensors"))
    said = []
    for other in (generator, resumed):
        said.append(other.targets(steps[3][0][0], steps[3][1][0]))
        for seen in steps[3:]:
            other.observe(3, *seen)
        other.end_epoch()
        take(other, run, range(4, 5))
    assert all(torch.equal(said[0][task].nan_to_num(), said[1][task].nan_to_num()) for task in said[0])
    assert same(generator.state_dict(), resumed.state_dict())


@every_generator
def test_the_state_follows_the_samples_ids_not_their_places(name: str) -> None:
    """The data packed anew, in another order and at other numbers, goes on from the same checkpoint."""
    run = LearnedRun(samples=23, seed=5, global_batch=4)
    state = prepared(name, run).state_dict()
    order = np.random.default_rng(0).permutation(run.samples)
    moved = LearnedRun(samples=23, seed=5, global_batch=4, first=100)
    moved.ids, moved.truth = run.ids[order], run.truth[order]
    packed = generator_of(name, moved)
    packed.load_state_dict(state)
    loaded = packed.state_dict()
    for key in state:
        by_sample = key.split(".")[0] in BY_SAMPLE
        assert torch.equal(loaded[key], state[key][order] if by_sample else state[key]), key


@every_generator
def test_the_order_of_handing_samples_over_does_not_matter(name: str) -> None:
    run = LearnedRun(samples=23, seed=5, global_batch=4)
    shuffled = generator_of(name, run, np.random.default_rng(1).permutation(run.samples))
    assert same(take(generator_of(name, run), run, range(1, 4)), take(shuffled, run, range(1, 4)))


@every_generator
def test_a_state_of_other_data_or_another_generator_is_refused(name: str) -> None:
    run, other = LearnedRun(samples=5, seed=1, global_batch=2), LearnedRun(samples=6, seed=1, global_batch=2)
    with pytest.raises(ConfigError, match=r"knows 6 train samples, \d of them among this data set's 5: start anew"):
        generator_of(name, run).load_state_dict(generator_of(name, other).state_dict())
    for key in generator_of(name, run).state_dict():
        state = generator_of(name, run).state_dict()
        del state[key]
        with pytest.raises(ConfigError, match="knows 0 train samples" if key == "ids" else f"has no '{key}'"):
            generator_of(name, run).load_state_dict(state)


# --- ranks


def on_ranks(name: str, run: LearnedRun, accumulation: int, epochs: range, state: State | None = None) -> State:
    generator = generator_of(name, run)
    if state is not None:
        generator.load_state_dict(state)
    return take(generator, run, epochs, dist.get_rank(), dist.get_world_size(), accumulation)


@pytest.mark.parametrize("name", ["sugrm", "ulag"])  # ULGM: test_ulgm
def test_two_ranks_give_the_labels_of_one_and_so_does_a_state_that_moved(ranks: Ranks, name: str) -> None:
    run = LearnedRun(samples=29, seed=7, global_batch=6, absent=0.2)  # 29 = 4 * 6 + 5: filler on 2 ranks
    alone = take(generator_of(name, run), run, range(1, 5))
    half = ranks(on_ranks, 2, name, run, 2, range(1, 3))
    assert same(half[0], half[1]), "ranks differ"
    for state in ranks(on_ranks, 2, name, run, 1, range(3, 5), half[1]):
        assert same(state, alone)


def divided(name: str, run: LearnedRun, epochs: range, state: State | None = None) -> tuple[State, int, dict[str, Any]]:
    """The state after these epochs, the rows of features that this rank has held, and what others get of it."""
    generator = generator_of(name, run, divide_above=0.0)
    if state is not None:
        generator.load_state_dict(state)
    whole = take(generator, run, epochs, dist.get_rank(), dist.get_world_size())
    held = {len(t) for t in tensors(generator._features) if t.dim() == 2}  # type: ignore[attr-defined]
    assert len(held) == 1
    return whole, held.pop(), generator.state_dict(keep=dist.get_rank() == 1)


@every_generator
@pytest.mark.parametrize("world", [2, 4])
def test_features_divided_over_ranks_give_the_same_labels(ranks: Ranks, name: str, world: int) -> None:
    """And the same checkpoint, which is read with any number of ranks, divided or not."""
    run = LearnedRun(samples=29, seed=7, global_batch=8, absent=0.2)
    alone = take(generator_of(name, run), run, range(1, 5))
    half = ranks(divided, 2, name, run, range(1, 3))[1][0]
    whole = generator_of(name, run)
    whole.load_state_dict(half)
    for state in (
        take(whole, run, range(3, 5)),
        *(told[0] for told in ranks(divided, world, name, run, range(3, 5), half)),
    ):
        assert state.keys() == alone.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, alone[key], rtol=0, atol=1e-6 if tensor.is_floating_point() else 0)
    for rank, (state, held, kept) in enumerate(ranks(divided, world, name, run, range(1, 3))):
        assert held <= -(-29 // world) + 1, "a rank holds its part and one row more"
        assert same(kept, state) if rank == 1 else kept == {}


@every_generator
def test_features_are_divided_where_they_are_large(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LearnedRun(samples=9, seed=2, global_batch=4)
    needed = get_label_generator(name).state_bytes(run.samples, run.widths) / 2**30
    for bound, expected in ((None, False), (2 * needed, False), (needed / 2, True)):
        assert generator_of(name, run, divide_above=bound)._divided is expected  # type: ignore[attr-defined]
    monkeypatch.setattr("mmsa_dist.label_generators.state.DIVIDE_ABOVE", needed / 2)
    assert generator_of(name, run)._divided  # type: ignore[attr-defined]


# --- cost


class Watch(TorchDispatchMode):
    """Counts the elements that operators read and write, and notes those that make the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "unique")
    BY_ROW = ("index", "index_put_", "index_fill_", "scatter_reduce_")
    """These touch the rows that an index names, not all rows of their first argument."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.elements = 0
        self.waits: list[str] = []
        self.whole: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITS):
            self.waits.append(name)
        for tensor in tensors((args, kwargs or {}, out)):
            if not len(tensor.shape) or tensor.shape[0] < self.samples:
                self.elements += tensor.numel()
            elif name not in self.BY_ROW:
                self.whole.append(name)
        return out


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in containers, and in our own objects but layers."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from tensors(part)
    elif type(tree).__module__.startswith("mmsa_dist.") and not isinstance(tree, nn.Module):
        yield from tensors(vars(tree) if hasattr(tree, "__dict__") else [])


def watched(name: str, samples: int) -> Watch:
    run = LearnedRun(samples=samples, seed=0, global_batch=8)
    generator = generator_of(name, run)
    seen: tuple[Batch, Prediction] = run.step(2, piece(list(range(8))))
    generator.observe(1, [seen[0]], [seen[1]])
    with Watch(samples) as watch:
        generator.targets(*seen)
        generator.observe(2, [seen[0]], [seen[1]])
    return watch


@every_generator
def test_a_step_costs_the_same_whatever_the_number_of_samples_and_never_waits_for_the_device(name: str) -> None:
    small, large = watched(name, 100), watched(name, 10_000)
    assert small.whole == large.whole == [], "touches a row of every sample"
    assert small.elements == large.elements > 0
    assert small.waits == large.waits == []


def test_the_watch_sees_what_it_should() -> None:
    state, mask = torch.zeros(100), torch.zeros(100, dtype=torch.bool)
    with Watch(100) as watch:
        state.mean().item()
        state[mask]
    assert "mean" in watch.whole and {"_local_scalar_dense"} <= set(watch.waits)


@every_generator
def test_the_size_of_the_state_is_what_is_said(name: str) -> None:
    run = LearnedRun(samples=1000, seed=0, global_batch=8)
    held = [t for t in tensors(generator_of(name, run)) if t.dim() and len(t) >= 1000]
    size = sum(t.numel() * t.element_size() for t in held) + 8 * 1000  # ids
    said = get_label_generator(name).state_bytes(1000, run.widths)
    assert said == pytest.approx(size, rel=2e-3)  # but for the one row that is not read


def test_the_size_of_the_state_for_mosei() -> None:
    sizes = [get_label_generator(n).state_bytes(16_326, {"M": 128, "T": 32, "A": 16, "V": 32}) for n in MADE]
    assert sizes[1] < sizes[0] < sizes[2] and all(5e6 < size < 16e6 for size in sizes)


# --- every system with every generator


@pytest.mark.parametrize("system", system_names())
@pytest.mark.parametrize("name", [*MADE, "multimodal", "none"])
def test_every_multi_task_system_learns_with_every_generator(system: str, name: str) -> None:
    """Gradients for every parameter in every step, the first epoch's too; labels move from the second epoch on."""
    batch = ragged(size=6, longest=4, absent={"audio": [2]})
    cls = get_system(system)
    own = {"unimodal_targets": "own"} if "unimodal_targets" in cls.Config.model_fields else {}  # ufen_mtfn's option
    model = build(cls, spec_for(), **own)
    widths = model.feature_widths()
    if name in MADE and not widths:
        with pytest.raises(ConfigError, match=f"label generator '{name}' reads features of M and of at least one of"):
            made(name, batch, widths)
        return
    generator = made(name, batch, widths)
    if generator.layers is not None:
        model.attach(generator.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(1, 4):
        optimizer.zero_grad()
        prediction = model.train()(batch)
        losses = model.loss(prediction, batch, generator.targets(batch, prediction))
        losses.total.backward()
        assert losses.total.isfinite()
        for parameter, values in model.named_parameters():
            assert values.grad is not None and values.grad.isfinite().all(), parameter
        optimizer.step()
        generator.observe(epoch, [batch], [prediction])
        generator.end_epoch()
    assert all(values.isfinite().all() for values in model.parameters())
    labels = generator.labels_in(generator.state_dict())
    assert labels.keys() == (widths.keys() - {"M"} if name in MADE else set())
    for values in labels.values():
        assert values.isfinite().all() and (values != batch.labels["M"]).any()


def made(name: str, batch: Batch, widths: dict[str, int]) -> LabelGenerator:
    return make_generator(
        name,
        numbers=batch.numbers,
        ids=batch.numbers,
        labels=batch.labels["M"],
        widths=widths,
        label_range=(-3.0, 3.0),
    )
