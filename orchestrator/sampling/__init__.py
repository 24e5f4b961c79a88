"""Which recipe next: models of what recipes give, and the sampler that chooses by them."""
