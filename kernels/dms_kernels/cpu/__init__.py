"""Stock torch operations, arranged so that the cost is that of what is kept."""

import torch

# glibc returns a freed block to the kernel unless one as large was freed before, and then fresh pages can cost more
# than the arithmetic on them. 32 MiB is the most that it remembers.
torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
