"""Search: spread bits or bytes over the linears of a model, and measure the best ways."""
