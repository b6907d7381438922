"""Make FlashInfer compile its kernels for one geometry: python compile_attention.py HEAD_DIM GROUP."""

import sys

import torch

from hata_kernels.attend import SparseDecode
from hata_kernels.workspace import DecodeWorkspace


def main(head_dim: int, group: int) -> None:
    workspace = DecodeWorkspace.allocate(
        max_batch=1, q_heads=group, kv_heads=1, bits=64, max_context=16, max_kept=16, device="cuda"
    )
    SparseDecode(workspace, head_dim=head_dim, dtype=torch.bfloat16).plan([1])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
