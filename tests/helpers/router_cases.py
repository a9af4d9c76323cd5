"""What routers are given: hidden states, and parameters as if calibrated."""

import torch

HIDDEN = 12


def hidden_states(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HIDDEN, generator=generator).to(dtype)


def trained(router, seed=1, scale=1.0):
    """Give a router parameters as calibration would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return router
