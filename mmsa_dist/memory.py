"""What a rank must hold, by formula: weights, master copies, moments and gradients at each ZeRO stage.

With P trained numbers, F frozen ones, W ranks, b bytes a number of the precision (fp32 4, else 2) and B the numbers of
a bucket that gradients are reduced in (`engine.BUCKET`, at most P):

    stage   between steps                        gradients besides, at the end of a backward pass
    0       4 (P + F) + 8 P                      4 P
    1       b (P + F) + 12 P / W                 b P
    2       b (P + F) + 12 P / W                 b P / W, and what of the parameters at its ends is others'
    3       ((2 b + 12) P + b F) / W + b B       none; on the way the layer at work, whole

Adam's moments are 8 bytes a number; stages 1 to 3 keep an fp32 copy of each rank's part beside the working weights.
With the optimizer on the host (`engine.offload`) a rank's GPU and its part of the host hold, L the largest parameter:

    stage   on the GPU between steps             besides, while gradients are reduced    on the host
    1, 2    b (P + F) + b L                      b B                                     (16 + b) P / W + b L
    3       b (P + F) / W + b B                  the layer at work, whole                (16 + b) P / W

a part's gradients in fp32 and one more copy in the precision among it; where steps accumulate gradients, stages 1 and 2
keep b P / W more on the host.

What stands between steps is exact; a stage 2 rank keeps gradients by whole parameters, so for it and for stage 3 the
second column is the most that there can be. While gradients are reduced there is a bucket, b B, at stages 1 and 2 too.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmsa_dist.recipe import Recipe
    from shards.mix import AnyIndex

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Sizes:
    """Of a system, with its text encoder and its label generator.

    Attributes:
        trained: numbers that learn, by optimizer group.
        frozen: numbers that do not.
        largest: numbers of the largest parameter.
        label_state: bytes of what the label generator keeps of all samples.
        label_state_divided: whether each rank keeps its part only.
    """

    trained: dict[str, int]
    frozen: int
    largest: int
    label_state: int = 0
    label_state_divided: bool = False

    @property
    def learning(self) -> int:
        return sum(self.trained.values())


@dataclass(frozen=True)
class Need:
    """Bytes of one rank.

    Attributes:
        state: between steps.
        step: at most, at the end of a backward pass, which has let the activations go.
        host: of the memory beside the GPU's, where the optimizer's state lies there.
    """

    state: int
    step: int
    host: int = 0


def need(sizes: Sizes, stage: int, ranks: int, precision: str, bucket: int, offload: bool = False) -> Need:
    """Bytes of a rank at a ZeRO stage, the label generator's state among them.

    Args:
        offload: the optimizer's state is the host's, which stages 1 to 3 can.
    """
    p, f, w = sizes.learning, sizes.frozen, ranks
    b = 4 if precision == "fp32" else 2
    size = min(bucket, p)
    labels = sizes.label_state // (w if sizes.label_state_divided else 1)
    host = 0
    if offload and stage:
        host = (16 + b) * p // w + (b * sizes.largest if stage < 3 else 0)
        if stage == 3:
            state, more = b * (p + f) // w + b * size, b * sizes.largest
        else:
            state, more = b * (p + f + sizes.largest), b * size
    elif stage == 0:
        state, more = 4 * (p + f) + 8 * p, 4 * p
    elif stage == 3:
        state, more = ((2 * b + 12) * p + b * f) // w + b * size, b * sizes.largest
    else:
        at_ends = min(2, w - 1) * sizes.largest
        state, more = b * (p + f) + 12 * p // w, b * (p if stage == 1 else min(p, p // w + at_ends))
    return Need(labels + state, labels + state + more, host)


def checkpoint_bytes(sizes: Sizes) -> int:
    """Bytes on disk: fp32 weights, two moments of what learns, and the labels; the same at every stage."""
    return 12 * sizes.learning + 4 * sizes.frozen + sizes.label_state


def sizes_of(recipe: "Recipe", index: "AnyIndex") -> Sizes:
    """Counts the system of a recipe without making its weights."""
    from mmsa_dist.divided import outline
    from mmsa_dist.label_generators import get_label_generator, over_nothing
    from mmsa_dist.label_generators.state import DIVIDE_ABOVE
    from mmsa_dist.session import data_spec

    system = outline(recipe.system, recipe.model, data_spec(recipe, index))
    name = recipe.label_generator
    widths = system.feature_widths()
    generator = over_nothing(name, widths, index.label_range, **recipe.labels.given)
    if generator.layers is not None:
        system.attach(generator.layers)
    trained: dict[str, int] = {}
    parameters = dict(system.named_parameters())
    for key, parameter in parameters.items():
        if parameter.requires_grad:
            group = system.parameter_group(key)
            trained[group] = trained.get(group, 0) + parameter.numel()
    frozen = sum(p.numel() for p in parameters.values()) - sum(trained.values())
    kept = get_label_generator(name).state_bytes(index.splits["train"], widths)
    bound = DIVIDE_ABOVE if recipe.labels.divide_above is None else recipe.labels.divide_above
    largest = max((p.numel() for p in parameters.values()), default=0)
    return Sizes(trained, frozen, largest, kept, kept > bound * 2**30)
