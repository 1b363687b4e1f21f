"""What weights are, whatever file they lie in: checksums of every tensor, and copies in a series.

Public series of checkpoints hold wrong weights under some steps: 86 of the 154 steps of pythia-2.8b
serve those of the end of training (EleutherAI/pythia #205), two steps of pythia-12b the final
model's first shard (#206). Training does not come back to weights that it has left, so checksums
tell.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mechcausal.models import WEIGHTS_FILE
from mechcausal.models.adapter import ModelFileError, read_config
from mechcausal.support.messages import excerpt

_LEAST_ENTRIES = 64
"""Smaller tensors, biases for instance, may be equal by chance or because nothing moves them."""


@dataclass(frozen=True)
class WeightDigests:
    """Checksums of a model's weights.

    Attributes:
        sha256: of all tensors with their names, dtypes and shapes; the same for the same weights in
            another file, other shards, or with other metadata.
        matrices: by name, of every tensor with at least 64 entries that are not all equal.
    """

    sha256: str
    matrices: Mapping[str, str]


def weight_digests(folder: Path) -> WeightDigests:
    """Checksums of the safetensors in a model's folder, one tensor in memory at a time.

    Raises:
        ModelFileError: there are none, or they cannot be read.
    """
    digests: dict[str, str] = {}
    matrices: dict[str, str] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    flat = tensor.contiguous().flatten()
                    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
                    digest.update(memoryview(flat.view(torch.uint8).numpy()))
                    digests[name] = digest.hexdigest()
                    if flat.numel() >= _LEAST_ENTRIES and not bool((flat == flat[0]).all()):
                        matrices[name] = digests[name]
        except (OSError, SafetensorError) as error:
            reason = excerpt(error, 80)
            raise ModelFileError(f"{path}: not a safetensors file: {reason}") from None
    content = json.dumps(digests, sort_keys=True).encode()
    return WeightDigests(hashlib.sha256(content).hexdigest(), matrices)


def _weight_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: one, or the shards of an index."""
    path = folder / WEIGHTS_FILE
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if path.is_file() or not index.is_file():
        return [path]
    try:
        shards = {str(shard) for shard in read_config(index)["weight_map"].values()}
    except (KeyError, TypeError, AttributeError):
        raise ModelFileError(f"{index}: not an index of weights") from None
    if other := next((shard for shard in shards if Path(shard).name != shard), None):
        raise ModelFileError(f"{index}: weights named outside of the folder: {excerpt(other)}")
    return [folder / shard for shard in sorted(shards)]


def copies(series: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """The members of a series of checkpoints whose weights belong to another step.

    Weights that several members share are those of the last member, if it is among them; else, if
    the members follow each other, those of the first of them, and training has not moved them; else
    nobody can tell whose they are, and all are named. In the same way a member is named that shares
    one part with another while the part differs in a member between them.

    Args:
        series: in the order of steps, the name of each member and the checksums of its parts (its
            tensors or its files), by name. A member without parts is never named.

    Returns:
        By name of a member, whose weights it holds.

    >>> copies([("0", {"W": "a"}), ("1", {"W": "b"}), ("2", {"W": "c"}), ("3", {"W": "b"})])
    {'1': 'holds the weights of 3'}
    >>> copies([("0", {"W": "a"}), ("1", {"W": "a"}), ("2", {"W": "b"})])
    {'1': 'holds the weights of 0'}
    >>> copies([("0", {"W": "a"}), ("1", {"W": "b"}), ("2", {"W": "a"}), ("3", {"W": "c"})])
    {'0': 'holds the weights of 2, but not of 1 between them',
     '2': 'holds the weights of 0, but not of 1 between them'}
    """
    names = [name for name, _ in series]
    equal = [json.dumps(dict(sorted(parts.items()))) if parts else "" for _, parts in series]
    reasons = {
        names[at]: f"holds the weights of {owner}"
        for at, owner in _not_own(names, equal, unmoved=False).items()
    }
    rest = [(name, parts) for name, parts in series if name not in reasons]
    names = [name for name, _ in rest]
    for part in sorted({part for _, parts in rest for part in parts}):
        digests = [parts.get(part, "") for _, parts in rest]
        for at, owner in _not_own(names, digests, unmoved=True).items():
            reasons.setdefault(names[at], f"holds {part} of {owner}")
    return {name: reasons[name] for name, _ in series if name in reasons}


def _not_own(names: Sequence[str], digests: Sequence[str], *, unmoved: bool) -> dict[int, str]:
    """Indices of the members whose digest is another's, and whose it is.

    Args:
        names: of the members, for the text.
        digests: of the members; "" never counts.
        unmoved: accept equal digests that follow each other: a part that is not being trained.
    """
    result: dict[int, str] = {}
    for digest in dict.fromkeys(filter(None, digests)):
        group = [at for at, other in enumerate(digests) if other == digest]
        between = [at for at in range(group[0], group[-1]) if digests[at] not in (digest, "")]
        if len(group) < 2 or (unmoved and not between):
            continue
        if group[-1] == len(digests) - 1:
            owner = group[-1]
        elif not between:
            owner = group[0]
        else:
            others = {at: next(i for i in reversed(group) if i != at) for at in group}
            result |= {
                at: f"{names[other]}, but not of {names[between[0]]} between them"
                for at, other in others.items()
            }
            continue
        result |= {at: names[owner] for at in group if at != owner}
    return result
