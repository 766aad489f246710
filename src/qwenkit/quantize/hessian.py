"""What passes through a matrix, as the sums that quantizers need of it."""

from __future__ import annotations

import torch

_BLOCK_COLUMNS = 512


class Hessian:
    """The sum of x xᵀ over the rows x of a matrix's inputs, and of |x|.

    Half of the second derivative of ‖x Wᵀ - x Qᵀ‖² by a row of Q (arXiv 2210.17323), fp32
    [columns, columns]. `absolute` is the sum of |x|, fp64 [columns], `tokens` the number of rows.
    """

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, columns)
        self.absolute = torch.zeros(columns, dtype=torch.float64)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take rows fp32 [tokens, columns] in."""
        columns = x.shape[1]
        for start in range(0, columns, _BLOCK_COLUMNS):  # the upper half: the rest is the same
            stop = min(start + _BLOCK_COLUMNS, columns)
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.absolute += x.abs().sum(0, dtype=torch.float64)
        self.tokens += len(x)

    def matrix(self) -> torch.Tensor:
        """The whole of it, fp32 [columns, columns]; a new tensor."""
        whole, columns = self._sum.clone(), len(self._sum)
        for start in range(0, columns, _BLOCK_COLUMNS):  # the lower half is the upper one
            stop = min(start + _BLOCK_COLUMNS, columns)
            whole[stop:, start:stop] = whole[start:stop, stop:].T
            upper = whole[start:stop, start:stop].triu()
            whole[start:stop, start:stop] = upper + upper.triu(1).T
        return whole

    def merge(self, other: Hessian) -> None:
        """Add what another one has seen."""
        self._sum += other._sum
        self.absolute += other.absolute
        self.tokens += other.tokens

    def scale_inputs(self, scales: torch.Tensor) -> None:
        """As if all inputs had been divided by `scales` [columns]."""
        self._sum.div_(scales).div_(scales[:, None])
        self.absolute /= scales

    @property
    def mean_square(self) -> torch.Tensor:
        """Mean of x², fp32 [columns]; zeros where nothing came."""
        return self._sum.diagonal() / max(self.tokens, 1)

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean of |x|, fp32 [columns]; zeros where nothing came."""
        return (self.absolute / max(self.tokens, 1)).float()


class FeedSums:
    """The sums of what a feed reads, one for each expert where it has some.

    An expert that few tokens chose would be fitted to these alone: as many as its width are made up
    for by what others saw, `alike` meaning that all experts read inputs of one kind.
    """

    def __init__(self, columns: int, experts: int, *, alike: bool) -> None:
        self.each = [Hessian(columns) for _ in range(experts)]
        self._alike = alike
        self._others: torch.Tensor | None = None

    def take(self, x: torch.Tensor, ends: torch.Tensor | None = None) -> None:
        """Take rows fp32 [tokens, columns] in, sorted by expert as `ends` [experts] says."""
        start = 0
        for number, stop in enumerate([len(x)] if ends is None else ends.tolist()):
            if stop > start:
                self.each[number].add(x[start:stop])
            start = stop

    def matrix(self, number: int) -> tuple[torch.Tensor | None, str | None]:
        """What to fit expert `number` to, fp32 [columns, columns], and a remark. None where no
        token chose it.
        """
        own = self.each[number]
        if not own.tokens:
            return None, "no token chose this expert: rounded to nearest"
        missing = len(own.absolute) - own.tokens
        if len(self.each) == 1 or missing <= 0:
            return own.matrix(), None
        remark = f"{own.tokens} tokens chose this expert: fitted to what others saw as well"
        return own.matrix() + missing * self._mean_of_all(), remark

    def _mean_of_all(self) -> torch.Tensor:
        if self._others is None:
            tokens = sum(each.tokens for each in self.each)
            if self._alike:
                total = torch.zeros_like(self.each[0].matrix())
                for each in self.each:
                    total += each.matrix()
            else:  # each expert's channels are its own: only how large they are is known
                squares = [each.mean_square * each.tokens for each in self.each]
                total = torch.diag(torch.stack(squares).sum(0))
            self._others = total / tokens
        return self._others

    def all(self) -> Hessian:
        """The sums over all experts; their own where there is one."""
        if len(self.each) == 1:
            return self.each[0]
        total = Hessian(len(self.each[0].absolute))
        for each in self.each:
            total.merge(each)
        return total

    def scale_inputs(self, scales: torch.Tensor) -> None:
        """As if all inputs had been divided by `scales` [columns]."""
        for each in self.each:
            each.scale_inputs(scales)
        self._others = None
