"""Compare any two checkpoints: which tensors changed, by what rank, and along which direction.

    python examples/compare_two_checkpoints.py BASE CHECKPOINT

Neither needs a recipe or a described architecture.
"""

import argparse

from orthogonalize import verify

parser = argparse.ArgumentParser()
parser.add_argument("base", help="a checkpoint folder or a Hub id")
parser.add_argument("checkpoint", help="the folder of the other one")
given = parser.parse_args()

audit = verify(given.checkpoint, given.base, logits=False, record=False)
print(audit.verdict())
print(f"{audit.same} tensors are identical, {len(audit.added)} were added, {len(audit.missing)} are missing")
for name, change in sorted(audit.changed.items(), key=lambda item: -item[1]):
    found = audit.differences.get(name)
    rank = "?" if found is None else "full" if found.rank is None else found.rank
    print(f"{name}: changed by {change:.2%}, rank {rank}")
if audit.common is not None:
    print(f"directions that the changes share: {list(audit.common.basis.shape)}")
