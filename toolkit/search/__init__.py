"""Search: spread bits or bytes over the linears of a model, and rank the ways to do it."""
