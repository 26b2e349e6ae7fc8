"""A fair comparison of methods on your own data; of the library, only the command line imports this package."""
