"""A fair comparison of methods on your own data; this package is imported by no other part of the library."""
