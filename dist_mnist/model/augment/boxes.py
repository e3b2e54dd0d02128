"""Boxes within images, one for each sample, as masks."""

import torch


def box_mask(
    top: torch.Tensor, bottom: torch.Tensor, left: torch.Tensor, right: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """(B, 1, H, W) bool of images (B, C, H, W): True in rows [top, bottom), columns [left, right), (B,) int64 each."""
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
