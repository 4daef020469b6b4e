"""Scripts, each run by its path; a package so that `benchmarks.offload` is another module than `offload`."""
