"""One module a paper: each composes the library's functions into the paper's experiment."""
