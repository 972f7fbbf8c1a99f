"""Damaged shards found before anything starts, and a data set without them.

Which shards are left out is decided once, by whoever starts the work, and told to all others by the shards' addresses:
so all agree on the samples, also after a restart, whatever has become of the files meanwhile.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shards.errors import ConfigError, DataError
from shards.index import Index
from shards.trust import QUARANTINE


@dataclass(frozen=True)
class Damaged:
    """A shard that is not what its index says.

    Attributes:
        address: of its tar, as `without` takes it.
        split, samples: what is lost.
        why: as the reader would say it.
    """

    address: str
    split: str
    samples: int
    why: str


def address(index: Index, shard_no: int) -> str:
    """What a shard is called outside its data set, wherever that lies: its name, then the tar's."""
    return f"{index.name}/{index.shards[shard_no].url}"


def damaged(index: Index) -> list[Damaged]:
    """The shards of which a file is missing or damaged. Every byte is read (and fetched, of a remote data set).

    Raises:
        TransientError, ConfigError: a remote one does not answer, or may not be read: that is no damage.
    """
    found = []
    for n, shard in enumerate(index.shards):
        try:
            index.table(n)
            index.expected_tar(n).check()
        except DataError as error:
            found.append(Damaged(address(index, n), shard.split, shard.samples, str(error).removesuffix(QUARANTINE)))
    return found


def without(indexes: Sequence[Index], addresses: Collection[str]) -> list[Index]:
    """The data sets without the shards of these addresses.

    Raises:
        ConfigError: there is no such shard.
    """
    left = [{n for n in range(len(index.shards)) if address(index, n) in addresses} for index in indexes]
    known = {address(index, n) for index, numbers in zip(indexes, left, strict=True) for n in numbers}
    if unknown := set(addresses) - known:
        raise ConfigError(
            f"data.without: {min(unknown)} is no shard of {', '.join(index.where for index in indexes)}; give the data "
            f"set's name and the tar's, like {address(indexes[0], 0)}"
        )
    return [index.without(numbers) if numbers else index for index, numbers in zip(indexes, left, strict=True)]
