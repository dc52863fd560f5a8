"""What PyTorch has no public name for, read in 2.13."""

import torch

foreach_add_ = torch._foreach_add_
