"""Masks of boxes within images, one box per sample."""

import torch

Span = tuple[torch.Tensor, torch.Tensor]  # start and (exclusive) stop; (B,) int64 each


def box_mask(rows: Span, columns: Span, images: torch.Tensor) -> torch.Tensor:
    """Return a mask (B, 1, H, W) bool for images (B, C, H, W), True where row and column are within their spans."""
    _, _, height, width = images.shape
    return (_within(rows, height)[:, :, None] & _within(columns, width)[:, None, :])[:, None]


def _within(span: Span, side: int) -> torch.Tensor:
    first, stop = span
    places = torch.arange(side, device=first.device)
    return (places >= first[:, None]) & (places < stop[:, None])
