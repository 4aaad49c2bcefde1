"""Budgets: spread a number of bits, bytes or milliseconds over the linears of a model."""
