"""What the student is to predict: the teacher's logits, balanced over prototypes, as a softmax.

Sinkhorn-Knopp and centring both end in ``q[b, k] = softmax over k of (t[b, k] / temperature + offset[k])``: one number a
prototype says it all, the normaliser of a row follows. So a target is the teacher's logits (kept, or made again from
their two factors a piece at a time) and one offset a prototype, never a matrix of probabilities.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dinocell.ssl.heads import Projection
