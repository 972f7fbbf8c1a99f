"""The largest batch of an epoch taken forward and backward before the first step, and forgotten.

What does not fit stops a run at once, not in the middle of an epoch. Nothing that is learned depends on it.
"""

import time

import numpy as np

from mmsa_dist.run_folder import Events
from mmsa_dist.session import Session, cost_rule
from shards.costs import CostRule, Costs
from shards.plan import Plan

STEPS = 512
"""Steps from the first one on among which the largest is looked for: so that it takes no longer in a larger set."""


def dry_run(session: Session, events: Events) -> None:
    """One step of this rank without learning, over the largest batch to come; not where there is no step to come.

    Raises:
        TrainingError: it does not fit into memory.
    """
    recipe, engine, generator = session.recipe, session.engine, session.generator
    epoch, first = session.progress.get("epoch", 1), session.progress.get("step_in_epoch", 0)
    if not recipe.train.dry_run or epoch > recipe.train.epochs:
        return
    began = time.monotonic()
    plan, pieces = session.plan(epoch), (session.rank, session.world, recipe.optim.accumulation)
    number = largest(session, plan, first)
    batches = [batch.to(engine.device) for batch in session.loader.step(plan, number, *pieces)]
    engine.dry_step(batches, lambda p, b: session.system.loss(p, b, generator.targets(b, p)))
    longest = {name: max(batch.values[name].shape[1] for batch in batches) for name in batches[0].values}
    events.write("dry_run", step=number + 1, longest=longest, seconds=time.monotonic() - began)


def largest(session: Session, plan: Plan, first: int) -> int:
    """The step from `first` on whose widest micro-batch is padded to the most; the same on every rank.

    The very next one where tables would have to be fetched to know.
    """
    index, data = session.index, session.recipe
    steps = range(first, min(plan.num_steps, first + STEPS))
    if index.remote or len(steps) < 2:
        return first
    rule = cost_rule(index, session.spec)
    costs, pieces = Costs(index, rule), session.world * data.optim.accumulation
    bound = data.text.max_tokens if rule == CostRule((("n_tokens", 1),)) else None

    def padded(step: int) -> int:
        numbers = plan.step(step)
        lengths = np.minimum(costs(numbers), bound) if bound else costs(numbers)
        return -(-len(numbers) // pieces) * int(lengths.max())

    return max(steps, key=padded)
