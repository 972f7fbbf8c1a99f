"""The fused features of a run's test split in two dimensions, as papers show them, by t-SNE (van der Maaten & Hinton).

Computed once a run from its best weights, with a fixed seed and one thread, and kept in its folder: the same picture
every time.

Shapes: N test samples, d width of the fused features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mmsa_dist.predictor import Predictor, chunks
from mmsa_dist.recipe import Recipe, read_recipe
from mmsa_dist.session import open_index
from shards.mix import open_reader
from shards.utterance import Utterance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "tsne.npz"
"""In a run's folder: ``key``, ``y`` and ``xy``."""

SEED = 0
PERPLEXITY = 30.0
"""scikit-learn's; of few samples a third of them."""
FEWEST = 5
"""Samples, below which there is nothing to see."""
SIZE = 64
"""Samples at a time."""


@dataclass(frozen=True)
class Map:
    """Where samples lie.

    Attributes:
        xy: (N, 2) float32. y: (N,) float32 labels; of classes the number of the first one that is there.
    """

    xy: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32]


def mapped(folder: Path) -> Map | None:
    """The test split of the run in `folder`, from its file where it was made before; None where its system names no
    fused features, or they are all alike.

    Raises:
        MmsaError, OSError: the run's weights or its data cannot be read.
    """
    file = folder / FILE
    if not file.is_file():
        found = features(folder)
        if found is None:
            return None
        keys, y, vectors = found
        _keep(file, key=np.array(keys, dtype=np.str_), y=y, xy=embedded(vectors))
    with np.load(file, allow_pickle=False) as kept:
        return Map(kept["xy"], kept["y"])


def features(folder: Path) -> tuple[list[str], npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """Keys, labels (N,) and fused features (N, d) of the test split, by the best weights of the run in `folder`; None
    where there are none to be told apart."""
    recipe, predictor = read_recipe(folder / "recipe.yaml"), Predictor.load(folder)
    keys: list[str] = []
    labels: list[float] = []
    vectors: list[npt.NDArray[np.float32]] = []
    for chunk in chunks((each for each in _test(recipe) if predictor.reads(each)), SIZE):
        found = predictor.fused(chunk)
        if found is None:
            return None
        keys += [each.key for each in chunk]
        labels += [_label(each, predictor.card.judged) for each in chunk]
        vectors.append(found)
    if len(keys) < FEWEST or not np.ptp(whole := np.concatenate(vectors), axis=0).any() or whole.shape[1] < 2:
        return None
    return keys, np.array(labels, dtype=np.float32), whole


def embedded(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N, d) -> (N, 2)."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    with threadpool_limits(limits=1):  # sums over several threads differ in their last digits, and these grow
        made = TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(vectors)
    return np.asarray(made, dtype=np.float32)


def figure(points: Map, title: str) -> "Figure":
    """A dot a sample, in the colour of its label."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = picture.subplots()
    most = float(np.abs(points.y).max()) or 1.0
    low = -most if points.y.min() < 0 else 0.0
    x, y = points.xy.T
    dots = axes.scatter(x, y, c=points.y, cmap="coolwarm", vmin=low, vmax=most, s=14, linewidths=0, alpha=0.85)
    axes.set(xticks=[], yticks=[], title=title)  # neither axis has a unit
    picture.colorbar(dots, label="label")
    return picture


def _test(recipe: Recipe) -> Iterator[Utterance]:
    index = open_index(recipe)
    with open_reader(index) as reader:
        for number in index.numbers("test"):
            yield reader.sample(number, with_text=recipe.text.encoder is not None)


def _label(utterance: Utterance, judged: tuple[str, ...]) -> float:
    if judged == ("M",):
        return float(utterance.labels["M"])
    return float(np.argmax([utterance.labels[task] for task in judged]))


def _keep(file: Path, **arrays: npt.NDArray[np.generic]) -> None:
    partial = file.with_name(f".{file.name}")
    with partial.open("wb") as out:
        np.savez(out, **arrays)  # type: ignore[arg-type]
    partial.replace(file)
