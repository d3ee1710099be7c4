"""The product with a sparse ΔW, and its gradient, without an `[out, in]` matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Places(NamedTuple):
    """Where the entries of a sparse matrix are, by rows and by columns; `starts` say where each begins. All int32."""

    columns: Tensor  # [nnz], by rows
    row_starts: Tensor  # [out]
    rows: Tensor  # [nnz], by columns
    column_starts: Tensor  # [in]
    by_column: Tensor  # [nnz]: the order of the entries, numbered by rows, that `rows` has

    @classmethod
    def from_indices(cls, indices: Tensor, rows: int, columns: int) -> Places:
        """`indices` `[nnz]` int64, flat and ascending, of a matrix of this shape."""
        row, column = indices // columns, indices % columns
        sorted_columns, by_column = column.sort(stable=True)
        starts = (
            torch.searchsorted(line, torch.arange(count, device=line.device))
            for line, count in ((row, rows), (sorted_columns, columns))
        )
        return cls(
            *(
                found.int()
                for found in (column, next(starts), row[by_column], next(starts), by_column)
            )
        )


class SparseProduct(torch.autograd.Function):
    """`x` `[..., in]` → x Sᵀ `[..., out]` for a sparse S `[out, in]`, with a gradient for its values alone; no `[out, in]` matrix is made.

    Row i of (x Sᵀ)ᵀ is a weighted sum of rows of xᵀ: what torch calls an embedding bag. ∂L/∂x is the same with S transposed, and
    ∂L/∂v_k, for the value v_k at place (i, j), the product of row j of xᵀ with row i of (∂L/∂y)ᵀ: that bag's gradient for its weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.places = places
        y = F.embedding_bag(
            places.columns, _transposed(x), places.row_starts, mode="sum", per_sample_weights=values
        )
        return _transposed(y).view(*x.shape[:-1], len(places.row_starts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, values = ctx.saved_tensors
        places, of_values = ctx.places, None
        dtype = torch.promote_types(
            x.dtype, torch.float32
        )  # a bag's gradient in bf16 is missing in some versions of torch on GPUs
        with torch.enable_grad():
            weights = values.detach()[places.by_column].to(dtype).requires_grad_()
            bags = F.embedding_bag(
                places.rows,
                _transposed(gradient).to(dtype),
                places.column_starts,
                mode="sum",
                per_sample_weights=weights,
            )
        if ctx.needs_input_grad[1]:
            (found,) = torch.autograd.grad(bags, weights, _transposed(x).to(dtype))
            of_values = torch.empty_like(values)
            of_values[places.by_column] = found.to(values.dtype)
        return _transposed(bags.detach()).view(x.shape).to(x.dtype), of_values, None


def _transposed(x: Tensor) -> Tensor:
    """`[..., n]` → `[n, rows]`, contiguous."""
    return x.reshape(x.numel() // x.shape[-1] if x.numel() else 0, x.shape[-1]).t().contiguous()
