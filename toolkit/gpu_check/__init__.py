"""What there is to know about gblm on one GPU, within minutes: `gblm doctor --gpu-check`.

Every section takes a Place, so that its Python also runs where there is no GPU.
"""
