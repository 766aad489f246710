"""Memory for weights: pieces of huge pages that several share."""

import gc
import weakref
from itertools import pairwise

import torch

from qwenkit.kernels.cpu.memory import empty_weight


def test_weights_lie_side_by_side_without_touching_each_other() -> None:
    shapes = [(3, 5), (1, 64), (1000, 896), (7,), (4000, 9000), (16, 16)]
    dtypes = [torch.uint8, torch.float16, torch.float32, torch.uint8, torch.uint8, torch.float16]
    made = [empty_weight(*each) for each in zip(shapes, dtypes, strict=True)]
    for i, tensor in enumerate(made):
        tensor.fill_(i)
    for i, (tensor, shape, dtype) in enumerate(zip(made, shapes, dtypes, strict=True)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == i).all())
    starts = sorted((t.data_ptr(), t.nbytes) for t in made)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(starts))


def test_more_than_one_piece_holds_and_what_is_dropped_goes() -> None:
    first = [empty_weight((3 << 20,), torch.uint8) for _ in range(15)]  # more than a piece
    assert len({t.untyped_storage().data_ptr() for t in first}) == 15
    gone = weakref.ref(first[0])
    last = first.pop()
    last.fill_(7)
    del first
    gc.collect()
    assert gone() is None
    assert bool((last == 7).all())  # its neighbours are gone, its piece is not
