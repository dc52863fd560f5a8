import torch

# The tests' tensors are tiny: a second thread costs more than it gives, and far more on a machine that is busy.
torch.set_num_threads(1)
