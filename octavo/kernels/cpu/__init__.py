"""Native CPU kernels: C sources, their loader, and the functions that call them."""
