"""Erase a concept from activations of your own, and let a fresh linear probe look for it.

    python examples/leace_on_your_own_activations.py                           # made-up samples
    python examples/leace_on_your_own_activations.py activations.safetensors   # `positive` [n, d] and `negative` [m, d]

Half of the samples fit the eraser and the probes; the other half tests them.
"""

import argparse

import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from orthogonalize import leace

parser = argparse.ArgumentParser()
parser.add_argument("file", nargs="?", help="a safetensors file with `positive` [n, d] and `negative` [m, d]")
given = parser.parse_args()

if given.file:
    sides = load_file(given.file)
    positive, negative = sides["positive"].double(), sides["negative"].double()
else:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 400, 32, generator=generator, dtype=torch.float64)
    positive[:, :3] += 1.0  # the concept

eraser = leace(positive[::2], negative[::2])  # h -> h - u (v^T (h - mean))


def accuracy(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Of a linear probe that is trained on one half of the samples and tested on the other."""
    x = torch.cat([positive, negative])
    y = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    return LogisticRegression(max_iter=1000).fit(x[::2], y[::2]).score(x[1::2], y[1::2])


print(f"probe before: {accuracy(positive, negative):.1%}")
print(f"probe after: {accuracy(eraser(positive), eraser(negative)):.1%}")
moved = (eraser(positive) - positive).norm() / positive.norm()
print(f"the samples moved by {moved:.1%} of their length")
print(f"as a map on the residual stream: rank {eraser.affine().rank}")
