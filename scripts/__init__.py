"""Launch scripts, and the program that writes most of them."""
